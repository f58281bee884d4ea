/* Attributes of addresses. */
#include <stdlib.h>
#include <string.h>

#include "emulated.h"

enum attribute {
	CONTEXT = 1,
	MEMORY_TYPE = 2,
	DEVICE_POINTER = 3,
	HOST_POINTER = 4,
	SYNC_MEMOPS = 6,
	BUFFER_ID = 7,
	IS_MANAGED = 8,
	DEVICE_ORDINAL = 9,
	IPC_CAPABLE = 10,
	RANGE_START = 11,
	RANGE_SIZE = 12,
	IS_MAPPED = 13,
	HANDLE_TYPES = 14,
	RDMA_CAPABLE = 15,
	ACCESS_FLAGS = 16,
	POOL = 17,
	MAPPING_SIZE = 18,
	MAPPING_BASE = 19,
	BLOCK_ID = 20,
};

#define HOST_MEMORY 1u
#define DEVICE_MEMORY 2u

union value {
	unsigned char truth;
	unsigned number;
	int ordinal;
	unsigned long long id;
	size_t size;
	uintptr_t address;
};

/* Call with the tables held. Returns the size of the value; 0 if the address has no such attribute. */
static size_t get(enum attribute attribute, uintptr_t at, const struct range *range, union value *value)
{
	bool device = range->memory != NULL;

	*value = (union value){.id = 0};
	switch (attribute) {
	case CONTEXT: /* none for a mapping of cuMemMap, which belongs to the process */
		value->address = (uintptr_t)range->context;
		return sizeof(value->address);
	case MEMORY_TYPE:
		value->number = device ? DEVICE_MEMORY : HOST_MEMORY;
		return sizeof(value->number);
	case HOST_POINTER:
		value->address = at;
		return device ? 0 : sizeof(value->address);
	case DEVICE_POINTER:
		value->address = at;
		return sizeof(value->address);
	case SYNC_MEMOPS:
	case IS_MANAGED:
	case RDMA_CAPABLE:
		return sizeof(value->truth);
	case BUFFER_ID:
		value->id = range->id;
		return sizeof(value->id);
	case DEVICE_ORDINAL:
		value->ordinal = ordinal(device ? range->memory->device : range->context->device);
		return sizeof(value->ordinal);
	case IPC_CAPABLE:
		value->truth = range->kind == ALLOCATED;
		return sizeof(value->truth);
	case RANGE_START:
	case MAPPING_BASE:
		value->address = range->base;
		return sizeof(value->address);
	case RANGE_SIZE:
	case MAPPING_SIZE:
		value->size = range->size;
		return sizeof(value->size);
	case IS_MAPPED:
		value->truth = 1;
		return sizeof(value->truth);
	case HANDLE_TYPES:
		value->id = device && range->memory->exportable;
		return sizeof(value->id);
	case ACCESS_FLAGS:
		value->number = range->access;
		return sizeof(value->number);
	case POOL:
		return sizeof(value->address);
	case BLOCK_ID:
		value->id = device ? range->memory->number : range->id;
		return sizeof(value->id);
	}
	return 0;
}

API CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr at)
{
	union value value;

	TRY(ready());
	HOLD(tables);
	struct range *range = find_range(at);
	size_t size = range == NULL ? 0 : get((enum attribute)attribute, at, range, &value);
	if (data == NULL || size == 0)
		return CUDA_ERROR_INVALID_VALUE;
	memcpy(data, &value, size);
	return CUDA_SUCCESS;
}
