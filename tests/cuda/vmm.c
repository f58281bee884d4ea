/* Virtual memory management: physical memory, addresses and access rights. */
#include <stdlib.h>
#include <sys/mman.h>

#include "emulated.h"

#define PINNED 1
#define ON_DEVICE 1
#define POSIX_FILE_DESCRIPTOR 1

typedef unsigned long long Handle;

typedef struct {
	int type, id;
} CUmemLocation;

typedef struct {
	int type, requested;
	CUmemLocation location;
	void *unused;
	unsigned char compression, rdma;
	unsigned short usage;
	unsigned char reserved[4];
} CUmemAllocationProp;

typedef struct {
	CUmemLocation location;
	unsigned flags;
} CUmemAccessDesc;

/* Handle numbers are never reused, so a released handle is recognised as such. */
struct handle {
	Handle number;
	struct memory *memory;
	unsigned references;
	struct handle *next;
};

struct reservation {
	uintptr_t base;
	size_t size;
	struct reservation *next;
};

static struct handle *handles;
static struct reservation *reservations;
static Handle numbers = 0x1000;

static struct handle *find_handle(Handle number)
{
	struct handle *handle = handles;

	while (handle != NULL && handle->number != number)
		handle = handle->next;
	return handle;
}

/* Takes over a reference to the memory. */
static CUresult add_handle(struct memory *memory, Handle *number)
{
	struct handle *handle = memory == NULL ? NULL : calloc(1, sizeof(*handle));

	if (handle == NULL) {
		if (memory != NULL)
			drop_memory(memory);
		return CUDA_ERROR_OUT_OF_MEMORY;
	}
	*handle = (struct handle){.number = numbers++, .memory = memory, .references = 1, .next = handles};
	handles = handle;
	*number = handle->number;
	return CUDA_SUCCESS;
}

static bool is_whole(size_t size)
{
	return size > 0 && size % GRANULARITY == 0;
}

static CUresult check(const CUmemAllocationProp *wanted, int *device)
{
	TRY(ready());
	if (wanted == NULL || wanted->type != PINNED || (wanted->requested & ~POSIX_FILE_DESCRIPTOR) != 0)
		return CUDA_ERROR_INVALID_VALUE;
	if (wanted->location.type != ON_DEVICE)
		return CUDA_ERROR_NOT_SUPPORTED;
	return find_device(wanted->location.id, device);
}

API CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *wanted, int option)
{
	int unused;

	TRY(check(wanted, &unused));
	if (size == NULL || option < 0 || option > 1)
		return CUDA_ERROR_INVALID_VALUE;
	*size = GRANULARITY;
	return CUDA_SUCCESS;
}

API CUresult cuMemCreate(Handle *number, size_t size, const CUmemAllocationProp *wanted, unsigned long long flags)
{
	int device, file;

	TRY(check(wanted, &device));
	if (number == NULL || flags != 0 || !is_whole(size))
		return CUDA_ERROR_INVALID_VALUE;
	TRY(lost(device));
	HOLD(tables);
	struct message create = {.what = CREATE, .device = device, .size = size};
	TRY(ask(&create, -1, &file));
	struct memory *memory = add_memory(&create, file);
	if (memory != NULL)
		memory->exportable = wanted->requested == POSIX_FILE_DESCRIPTOR;
	return add_handle(memory, number);
}

API CUresult cuMemRelease(Handle number)
{
	TRY(ready());
	HOLD(tables);
	struct handle *handle = find_handle(number);
	if (handle == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	if (--handle->references > 0)
		return CUDA_SUCCESS;
	for (struct handle **link = &handles; *link != NULL; link = &(*link)->next)
		if (*link == handle) {
			*link = handle->next;
			break;
		}
	drop_memory(handle->memory);
	free(handle);
	return CUDA_SUCCESS;
}

API CUresult cuMemRetainAllocationHandle(Handle *number, void *at)
{
	TRY(ready());
	HOLD(tables);
	struct range *range = find_range((uintptr_t)at);
	if (number == NULL || range == NULL || range->kind != MAPPING)
		return CUDA_ERROR_INVALID_VALUE;
	for (struct handle *handle = handles; handle != NULL; handle = handle->next)
		if (handle->memory == range->memory) {
			handle->references++;
			*number = handle->number;
			return CUDA_SUCCESS;
		}
	range->memory->references++;
	return add_handle(range->memory, number);
}

API CUresult cuMemExportToShareableHandle(int *shared, Handle number, int type, unsigned long long flags)
{
	TRY(ready());
	HOLD(tables);
	struct handle *handle = find_handle(number);
	if (shared == NULL || handle == NULL || flags != 0 || type != POSIX_FILE_DESCRIPTOR ||
	    !handle->memory->exportable)
		return CUDA_ERROR_INVALID_VALUE;
	struct message export = {.what = EXPORT, .number = handle->memory->number};
	return ask(&export, -1, shared);
}

/* `shared` is the descriptor itself, not its address; the caller keeps it. */
API CUresult cuMemImportFromShareableHandle(Handle *number, void *shared, int type)
{
	int file;

	TRY(ready());
	if (number == NULL || type != POSIX_FILE_DESCRIPTOR || (intptr_t)shared < 0 || (intptr_t)shared > INT32_MAX)
		return CUDA_ERROR_INVALID_VALUE;
	HOLD(tables);
	struct message import = {.what = IMPORT};
	CUresult result = ask(&import, (int)(intptr_t)shared, &file);
	if (result == CUDA_ERROR_UNKNOWN && !kernel_is_gone())
		return CUDA_ERROR_INVALID_VALUE; /* sending failed: not a descriptor */
	TRY(result);
	struct memory *memory = add_memory(&import, file);
	if (memory != NULL)
		memory->exportable = memory->imported = true;
	return add_handle(memory, number);
}

API CUresult cuMemAddressReserve(CUdeviceptr *at, size_t size, size_t alignment, CUdeviceptr hint,
				 unsigned long long flags)
{
	TRY(ready());
	if (at == NULL || flags != 0 || !is_whole(size) || (alignment & (alignment - 1)) != 0)
		return CUDA_ERROR_INVALID_VALUE;
	HOLD(tables);
	struct reservation *reservation = calloc(1, sizeof(*reservation));
	if (reservation == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	reservation->base = reserve(hint, size, alignment > GRANULARITY ? alignment : GRANULARITY);
	reservation->size = size;
	if (reservation->base == 0) {
		free(reservation);
		return CUDA_ERROR_OUT_OF_MEMORY;
	}
	reservation->next = reservations;
	reservations = reservation;
	*at = reservation->base;
	return CUDA_SUCCESS;
}

/* Whether anything is mapped among these addresses. */
static bool in_use(uintptr_t base, size_t size)
{
	for (struct range *range = first_range(); range != NULL; range = range->next)
		if (range->base < base + size && base < range->base + range->size)
			return true;
	return false;
}

API CUresult cuMemAddressFree(CUdeviceptr at, size_t size)
{
	TRY(ready());
	HOLD(tables);
	for (struct reservation **link = &reservations; *link != NULL; link = &(*link)->next) {
		struct reservation *reservation = *link;

		if (reservation->base != at || reservation->size != size)
			continue;
		if (in_use(at, size))
			return CUDA_ERROR_INVALID_VALUE;
		*link = reservation->next;
		munmap((void *)at, size);
		free(reservation);
		return CUDA_SUCCESS;
	}
	return CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, Handle number, unsigned long long flags)
{
	TRY(ready());
	HOLD(tables);
	struct handle *handle = find_handle(number);
	struct reservation *reservation = reservations;
	while (reservation != NULL && at - reservation->base >= reservation->size)
		reservation = reservation->next;
	if (handle == NULL || reservation == NULL || flags != 0 || offset != 0 || !is_whole(size) ||
	    at % GRANULARITY != 0 || size > handle->memory->size ||
	    size > reservation->base + reservation->size - at || in_use(at, size))
		return CUDA_ERROR_INVALID_VALUE;
	TRY(lost(handle->memory->device));
	return add_range(at, size, MAPPING, handle->memory) == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

/* The mapping that begins at *at and ends by end; advances *at. NULL if there is none. */
static struct range *next_mapping(uintptr_t *at, uintptr_t end)
{
	struct range *range = find_range(*at);

	if (range == NULL || range->kind != MAPPING || range->base != *at || range->base + range->size > end)
		return NULL;
	*at = range->base + range->size;
	return range;
}

static bool is_mapped(uintptr_t at, size_t size)
{
	uintptr_t end = at + size;

	while (at < end)
		if (next_mapping(&at, end) == NULL)
			return false;
	return size > 0;
}

/* Does not wait for copies, which then fail with an illegal address. A true driver may or may not wait. */
API CUresult cuMemUnmap(CUdeviceptr at, size_t size)
{
	uintptr_t end = at + size;

	TRY(ready());
	HOLD(tables);
	if (!is_mapped(at, size))
		return CUDA_ERROR_INVALID_VALUE;
	while (at < end)
		remove_range(next_mapping(&at, end));
	return CUDA_SUCCESS;
}

static CUresult check_access(const CUmemAccessDesc *wanted, uintptr_t at, size_t size)
{
	uintptr_t end = at + size;
	int device;

	if (wanted->location.type != ON_DEVICE)
		return CUDA_ERROR_NOT_SUPPORTED;
	TRY(find_device(wanted->location.id, &device));
	if (wanted->flags != NONE && wanted->flags != READ && wanted->flags != READ_WRITE)
		return CUDA_ERROR_INVALID_VALUE;
	while (at < end)
		if (next_mapping(&at, end)->memory->device != device)
			return CUDA_ERROR_INVALID_DEVICE; /* no device here is a peer of another */
	return lost(device);
}

API CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc *wanted, size_t count)
{
	uintptr_t end = at + size;

	TRY(ready());
	HOLD(tables);
	if (wanted == NULL || count == 0 || !is_mapped(at, size))
		return CUDA_ERROR_INVALID_VALUE;
	for (size_t row = 0; row < count; row++)
		TRY(check_access(&wanted[row], at, size));
	while (at < end) {
		struct range *range = next_mapping(&at, end);

		range->access = (enum access)wanted[count - 1].flags;
		TRY(protect(range));
	}
	return CUDA_SUCCESS;
}
