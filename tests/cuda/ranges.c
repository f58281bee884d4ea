/* The physical memory and the address ranges of this process. Call everything with the tables held. */
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulated.h"

bool opaque = true;

static struct memory *memories;
static struct range *ranges;
static unsigned long long made;

/* Takes ownership of the file, even on failure. */
struct memory *add_memory(const struct message *message, int file)
{
	struct memory *memory = calloc(1, sizeof(*memory));

	if (memory == NULL) {
		struct message drop = {.what = DROP, .number = message->number};

		close(file);
		ask(&drop, -1, NULL);
		return NULL;
	}
	memory->number = message->number;
	memory->size = message->size;
	memory->device = message->device;
	memory->file = file;
	memory->references = 1;
	memory->next = memories;
	memories = memory;
	return memory;
}

void drop_memory(struct memory *memory)
{
	struct message drop = {.what = DROP, .number = memory->number};

	if (--memory->references > 0)
		return;
	for (struct memory **link = &memories; *link != NULL; link = &(*link)->next)
		if (*link == memory) {
			*link = memory->next;
			break;
		}
	close(memory->file);
	ask(&drop, -1, NULL);
	free(memory);
}

/* Close the descriptors in a forked child. The lists stay, as another thread may have been changing them. */
void forget_memory(void)
{
	for (struct memory *memory = memories; memory != NULL; memory = memory->next)
		close(memory->file);
}

/* Reserve addresses that nobody else gets and the host cannot access. Returns 0 on failure. */
uintptr_t reserve(uintptr_t hint, size_t size, size_t alignment)
{
	size_t whole = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	void *place = mmap((void *)hint, whole + alignment, PROT_NONE, flags, -1, 0);

	if (place == MAP_FAILED)
		return 0;
	uintptr_t start = (uintptr_t)place, base = (start + alignment - 1) / alignment * alignment;
	if (base > start)
		munmap(place, base - start);
	munmap((void *)(base + whole), start + alignment - base);
	madvise((void *)base, whole, MADV_DONTFORK);
	return base;
}

/*
 * Give the host the access to a range that a kernel on the device would have. A true driver gives it none, and neither
 * does this one unless it is transparent.
 */
CUresult protect(const struct range *range)
{
	int allowed = range->access == NONE ? PROT_NONE : range->access == READ ? PROT_READ : PROT_READ | PROT_WRITE;
	void *place = (void *)range->base;

	if (opaque)
		return CUDA_SUCCESS;
	place = mmap(place, range->size, allowed, MAP_SHARED | MAP_FIXED, range->memory->file, 0);
	if (place == MAP_FAILED)
		return CUDA_ERROR_OPERATING_SYSTEM;
	madvise(place, range->size, MADV_DONTFORK);
	return CUDA_SUCCESS;
}

/* Add a range. Returns NULL without memory. */
struct range *add_range(uintptr_t base, size_t size, enum kind kind, struct memory *memory)
{
	struct range *range = calloc(1, sizeof(*range));

	if (range == NULL)
		return NULL;
	range->base = base;
	range->size = size;
	range->kind = kind;
	range->memory = memory;
	range->access = kind == MAPPING ? NONE : READ_WRITE;
	range->id = ++made;
	if (memory != NULL)
		memory->references++;
	range->next = ranges;
	ranges = range;
	return range;
}

/* Remove a range. The addresses of device memory stay reserved. */
void remove_range(struct range *range)
{
	for (struct range **link = &ranges; *link != NULL; link = &(*link)->next)
		if (*link == range) {
			*link = range->next;
			break;
		}
	if (range->memory != NULL) {
		if (!opaque)
			mmap((void *)range->base, range->size, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
		drop_memory(range->memory);
	}
	free(range);
}

/* Remove a range that is not a mapping of cuMemMap, and release its addresses. */
void free_range(struct range *range)
{
	uintptr_t base = range->base;
	size_t whole = (range->size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
	enum kind kind = range->kind;

	remove_range(range);
	if (kind != REGISTERED)
		munmap((void *)base, whole);
}

struct range *find_range(uintptr_t address)
{
	struct range *range = ranges;

	while (range != NULL && address - range->base >= range->size)
		range = range->next;
	return range;
}

struct range *first_range(void)
{
	return ranges;
}

/* Whether all of it is device memory; adjacent mappings count as one. */
bool is_device(uintptr_t address, size_t size)
{
	uintptr_t at = address;

	do {
		struct range *range = find_range(at);

		if (range == NULL || range->memory == NULL)
			return false;
		at = range->base + range->size;
	} while (at - address < size);
	return true;
}

bool is_page_locked(uintptr_t address, size_t size)
{
	struct range *range = find_range(address);

	return range != NULL && range->memory == NULL && range->base + range->size - address >= size;
}
