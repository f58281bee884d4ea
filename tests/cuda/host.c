/* Page-locked host memory. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>

#include "emulated.h"

#define REGISTER_READ_ONLY 8u

/* Whether this device number is a mounted tmpfs; the one of memfds is in no list of mounts. */
static bool is_tmpfs(unsigned long device)
{
	char line[8192];
	FILE *mounts = fopen("/proc/self/mountinfo", "re");
	bool found = false;

	while (mounts != NULL && !found && fgets(line, sizeof(line), mounts) != NULL) {
		unsigned major, minor;
		const char *type = strstr(line, " - ");

		found = sscanf(line, "%*d %*d %u:%u", &major, &minor) == 2 && makedev(major, minor) == device &&
			type != NULL && strncmp(type, " - tmpfs ", 9) == 0;
	}
	if (mounts != NULL)
		fclose(mounts);
	return found;
}

static bool is_memory(const char *name, unsigned long device)
{
	return name[0] != '/' || strncmp(name, "/memfd:", 7) == 0 || strncmp(name, "/SYSV", 5) == 0 ||
	       strncmp(name, "/dev/zero", 9) == 0 || is_tmpfs(device);
}

/* As with current kernels, pages of files on disk or FUSE cannot be locked for a device. */
static bool can_lock(uintptr_t address, size_t size, bool writable)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	uintptr_t at = address, end = address + size;
	char line[8192];

	while (maps != NULL && at < end && fgets(line, sizeof(line), maps) != NULL) {
		unsigned long from, to;
		unsigned major, minor;
		char rights[5];
		int name = 0;

		if (sscanf(line, "%lx-%lx %4s %*x %x:%x %*u %n", &from, &to, rights, &major, &minor, &name) != 5 ||
		    to <= at)
			continue;
		if (from > at || rights[0] != 'r' || (writable && rights[1] != 'w') ||
		    !is_memory(line + name, makedev(major, minor)))
			break;
		at = to;
	}
	if (maps != NULL)
		fclose(maps);
	return at >= end;
}

API CUresult cuMemHostAlloc(void **place, size_t size, unsigned flags)
{
	struct context *context;
	struct range *range = NULL;

	(void)flags;
	HOLD(tables);
	TRY(current(&context));
	if (place == NULL || size == 0)
		return CUDA_ERROR_INVALID_VALUE;
	size_t whole = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
	void *pages = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages != MAP_FAILED)
		range = add_range((uintptr_t)pages, size, PAGE_LOCKED, NULL);
	if (range == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	range->context = context;
	memset(pages, STALE, whole);
	*place = pages;
	return CUDA_SUCCESS;
}

/* Waits for its device, as a true driver does. */
API CUresult cuMemFreeHost(void *place)
{
	struct context *context;

	TRY(ready());
	finish_device_of((uintptr_t)place);
	HOLD(tables);
	TRY(current(&context));
	struct range *range = find_range((uintptr_t)place);
	if (range == NULL || range->base != (uintptr_t)place || range->kind != PAGE_LOCKED)
		return CUDA_ERROR_INVALID_VALUE;
	free_range(range);
	return CUDA_SUCCESS;
}

API CUresult cuMemHostRegister_v2(void *place, size_t size, unsigned flags)
{
	uintptr_t base = (uintptr_t)place;
	struct context *context;

	HOLD(tables);
	TRY(current(&context));
	if (place == NULL || size == 0 || base + size < base)
		return CUDA_ERROR_INVALID_VALUE;
	for (struct range *range = first_range(); range != NULL; range = range->next)
		if (range->base < base + size && base < range->base + range->size)
			return range->memory == NULL ? CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED :
						       CUDA_ERROR_INVALID_VALUE;
	if (!can_lock(base, size, (flags & REGISTER_READ_ONLY) == 0))
		return CUDA_ERROR_INVALID_VALUE;
	struct range *range = add_range(base, size, REGISTERED, NULL);
	if (range == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	range->context = context;
	return CUDA_SUCCESS;
}

API CUresult cuMemHostUnregister(void *place)
{
	struct context *context;

	TRY(ready());
	finish_device_of((uintptr_t)place);
	HOLD(tables);
	TRY(current(&context));
	struct range *range = find_range((uintptr_t)place);
	if (range == NULL || range->base != (uintptr_t)place || range->kind != REGISTERED)
		return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
	free_range(range);
	return CUDA_SUCCESS;
}
