/* Copies and fills: which are waited for, and which are put off. */
#include <stdlib.h>
#include <string.h>

#include "emulated.h"

/* Of pageable memory a true driver may stage as much, and return before it has arrived. */
#define STAGED_LIMIT ((size_t)64 << 10)

enum side { HOST, DEVICE, EITHER };

/* What is at an address, checked as a true driver checks it before anything happens. */
static CUresult look(uintptr_t address, size_t size, enum side side, bool *device)
{
	*device = side != HOST && is_device(address, size);
	return side == DEVICE && !*device ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult copy(uintptr_t to, enum side there, uintptr_t from, enum side here, size_t size, CUstream handle,
		     bool wait)
{
	struct operation operation = {.task = COPY, .to = to, .from = from, .size = size};

	pthread_mutex_lock(&tables);
	CUresult result = find_stream(handle, &operation.stream);
	if (result == CUDA_SUCCESS && size > 0)
		result = look(to, size, there, &operation.to_device);
	if (result == CUDA_SUCCESS && size > 0)
		result = look(from, size, here, &operation.from_device);
	bool to_pageable = !operation.to_device && !is_page_locked(to, size);
	bool from_pageable = !operation.from_device && !is_page_locked(from, size);
	pthread_mutex_unlock(&tables);
	if (result != CUDA_SUCCESS || size == 0)
		return result;
	if (operation.to_device && operation.from_device)
		wait = false; /* the host never waits for these, as is documented */
	else if (to_pageable || (from_pageable && size > STAGED_LIMIT))
		wait = true;
	if (!wait && from_pageable) {
		operation.staged = malloc(size);
		if (operation.staged == NULL)
			return CUDA_ERROR_OUT_OF_MEMORY;
		memcpy(operation.staged, (const void *)from, size);
		operation.from = (uintptr_t)operation.staged;
	}
	return submit(&operation, wait);
}

/* Not waited for, not even by those that are not called Async, as is documented. */
static CUresult fill(CUdeviceptr to, uint32_t pattern, unsigned width, size_t count, CUstream handle)
{
	struct operation operation = {
		.task = FILL,
		.to = to,
		.size = count * width,
		.pattern = pattern,
		.width = width,
	};
	bool unused;

	pthread_mutex_lock(&tables);
	CUresult result = find_stream(handle, &operation.stream);
	if (result == CUDA_SUCCESS &&
	    (to % width != 0 || count > SIZE_MAX / width || look(to, operation.size, DEVICE, &unused) != CUDA_SUCCESS))
		result = CUDA_ERROR_INVALID_VALUE;
	pthread_mutex_unlock(&tables);
	return result != CUDA_SUCCESS || count == 0 ? result : submit(&operation, false);
}

/* Each with its variant for programs whose default stream is the thread's own. */
#define VARIANTS(suffix, stream) \
	API CUresult cuMemcpy##suffix(CUdeviceptr to, CUdeviceptr from, size_t size) \
	{ \
		return copy(to, EITHER, from, EITHER, size, stream, true); \
	} \
	API CUresult cuMemcpyHtoD_v2##suffix(CUdeviceptr to, const void *from, size_t size) \
	{ \
		return copy(to, DEVICE, (uintptr_t)from, HOST, size, stream, true); \
	} \
	API CUresult cuMemcpyDtoH_v2##suffix(void *to, CUdeviceptr from, size_t size) \
	{ \
		return copy((uintptr_t)to, HOST, from, DEVICE, size, stream, true); \
	} \
	API CUresult cuMemcpyDtoD_v2##suffix(CUdeviceptr to, CUdeviceptr from, size_t size) \
	{ \
		return copy(to, DEVICE, from, DEVICE, size, stream, true); \
	} \
	API CUresult cuMemsetD8_v2##suffix(CUdeviceptr to, unsigned char value, size_t count) \
	{ \
		return fill(to, value, 1, count, stream); \
	} \
	API CUresult cuMemsetD16_v2##suffix(CUdeviceptr to, unsigned short value, size_t count) \
	{ \
		return fill(to, value, 2, count, stream); \
	} \
	API CUresult cuMemsetD32_v2##suffix(CUdeviceptr to, unsigned value, size_t count) \
	{ \
		return fill(to, value, 4, count, stream); \
	}

#define THREAD_STREAM ((CUstream)2)
#define OWN(stream) ((stream) == NULL ? THREAD_STREAM : (stream))
#define SAME(stream) (stream)

#define ASYNC_VARIANTS(suffix, meant) \
	API CUresult cuMemcpyAsync##suffix(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) \
	{ \
		return copy(to, EITHER, from, EITHER, size, meant(stream), false); \
	} \
	API CUresult cuMemcpyHtoDAsync_v2##suffix(CUdeviceptr to, const void *from, size_t size, CUstream stream) \
	{ \
		return copy(to, DEVICE, (uintptr_t)from, HOST, size, meant(stream), false); \
	} \
	API CUresult cuMemcpyDtoHAsync_v2##suffix(void *to, CUdeviceptr from, size_t size, CUstream stream) \
	{ \
		return copy((uintptr_t)to, HOST, from, DEVICE, size, meant(stream), false); \
	} \
	API CUresult cuMemcpyDtoDAsync_v2##suffix(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) \
	{ \
		return copy(to, DEVICE, from, DEVICE, size, meant(stream), false); \
	} \
	API CUresult cuMemsetD8Async##suffix(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) \
	{ \
		return fill(to, value, 1, count, meant(stream)); \
	} \
	API CUresult cuMemsetD16Async##suffix(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) \
	{ \
		return fill(to, value, 2, count, meant(stream)); \
	} \
	API CUresult cuMemsetD32Async##suffix(CUdeviceptr to, unsigned value, size_t count, CUstream stream) \
	{ \
		return fill(to, value, 4, count, meant(stream)); \
	}

VARIANTS(, NULL)
VARIANTS(_ptds, THREAD_STREAM)
ASYNC_VARIANTS(, SAME)
ASYNC_VARIANTS(_ptsz, OWN)
