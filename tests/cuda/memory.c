/* cuMemAlloc and the older way to share: handles of 64 bytes, and memory that ends with its owner. */
#include <string.h>
#include <sys/mman.h>

#include "emulated.h"

#define LAZY_ENABLE_PEER_ACCESS 1u

API CUresult cuMemGetInfo_v2(size_t *free, size_t *total)
{
	struct context *context;

	HOLD(tables);
	TRY(current(&context));
	if (free == NULL || total == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	struct message info = {.what = INFO, .device = context->device};
	TRY(ask(&info, -1, NULL));
	*free = info.size;
	*total = info.more;
	return CUDA_SUCCESS;
}

/* Reserve addresses for memory that the kernel driver has just sent. */
static CUresult place(const struct message *message, int file, enum kind kind, struct context *context, CUdeviceptr *at)
{
	struct memory *memory = add_memory(message, file);
	struct range *range = NULL;
	CUresult result;

	if (memory == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	uintptr_t base = reserve(0, memory->size, GRANULARITY);
	if (base != 0)
		range = add_range(base, memory->size, kind, memory);
	drop_memory(memory);
	if (range == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	range->context = context;
	range->opened = 1;
	result = protect(range);
	if (result == CUDA_SUCCESS)
		*at = base;
	else
		free_range(range);
	return result;
}

API CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t size)
{
	struct context *context;
	int file;

	HOLD(tables);
	TRY(current(&context));
	if (at == NULL || size == 0)
		return CUDA_ERROR_INVALID_VALUE;
	struct message allocate = {.what = ALLOCATE, .device = context->device, .size = size};
	TRY(ask(&allocate, -1, &file));
	return place(&allocate, file, ALLOCATED, context, at);
}

/* Waits for its device, as a true driver does. */
API CUresult cuMemFree_v2(CUdeviceptr at)
{
	struct context *context;

	TRY(ready());
	if (at == 0)
		return CUDA_SUCCESS;
	finish_device_of(at);
	HOLD(tables);
	TRY(current(&context));
	struct range *range = find_range(at);
	if (range == NULL || range->base != at || range->kind != ALLOCATED)
		return CUDA_ERROR_INVALID_VALUE;
	free_range(range);
	return CUDA_SUCCESS;
}

API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr at)
{
	struct context *context;

	HOLD(tables);
	TRY(current(&context));
	struct range *range = find_range(at);
	if (range == NULL || range->memory == NULL)
		return CUDA_ERROR_NOT_FOUND;
	if (base != NULL)
		*base = range->base;
	if (size != NULL)
		*size = range->size;
	return CUDA_SUCCESS;
}

API CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr at)
{
	struct context *context;

	HOLD(tables);
	TRY(current(&context));
	struct range *range = find_range(at);
	if (handle == NULL || range == NULL || range->kind != ALLOCATED)
		return CUDA_ERROR_INVALID_VALUE;
	struct message get = {.what = IPC_GET, .number = range->memory->number};
	TRY(ask(&get, -1, NULL));
	memcpy(handle->reserved, get.handle, sizeof(handle->reserved));
	return CUDA_SUCCESS;
}

/* A context that opens a handle again gets the same address, and must close it as often. It cannot open its own. */
API CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *at, CUipcMemHandle handle, unsigned flags)
{
	struct context *context;
	int file;

	HOLD(tables);
	TRY(current(&context));
	if (at == NULL || flags > LAZY_ENABLE_PEER_ACCESS)
		return CUDA_ERROR_INVALID_VALUE;
	struct message open = {.what = IPC_OPEN, .device = context->device};
	memcpy(open.handle, handle.reserved, sizeof(open.handle));
	TRY(ask(&open, -1, &file));
	for (struct range *range = first_range(); range != NULL; range = range->next)
		if (range->kind == OPENED && range->context == context && range->memory->number == open.number) {
			struct memory *again = add_memory(&open, file);

			if (again != NULL)
				drop_memory(again);
			range->opened++;
			*at = range->base;
			return CUDA_SUCCESS;
		}
	return place(&open, file, OPENED, context, at);
}

API CUresult cuIpcCloseMemHandle(CUdeviceptr at)
{
	struct context *context;

	TRY(ready());
	finish_device_of(at);
	HOLD(tables);
	TRY(current(&context));
	struct range *range = find_range(at);
	if (range == NULL || range->base != at || range->kind != OPENED || range->context != context)
		return CUDA_ERROR_INVALID_VALUE;
	if (--range->opened == 0)
		free_range(range);
	return CUDA_SUCCESS;
}
