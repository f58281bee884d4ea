/* Copies and fills: which ones the caller waits for, and which are deferred. */
#include <stdlib.h>
#include <string.h>

#include "emulated.h"

/* A true driver may stage this much pageable memory and return before the device has it. */
#define STAGED_LIMIT ((size_t)64 << 10)

enum side { HOST, DEVICE };

/* Tell whether an address is device memory. Checks it before anything happens, as a true driver does. */
static CUresult look(uintptr_t address, size_t size, enum side side, bool *device)
{
	*device = side == DEVICE && is_device(address, size);
	return side == DEVICE && !*device ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult copy(uintptr_t to, enum side there, uintptr_t from, enum side here, size_t size, CUstream handle,
		     bool wait)
{
	struct operation operation = {.to = to, .from = from, .size = size};

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
		wait = false; /* as documented, the host never waits for these */
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

/* As documented, the caller never waits, even without Async in the name. */
static CUresult fill(CUdeviceptr to, unsigned char value, size_t size, CUstream handle)
{
	struct operation operation = {.fill = true, .to = to, .size = size, .value = value};
	bool unused;

	pthread_mutex_lock(&tables);
	CUresult result = find_stream(handle, &operation.stream);
	if (result == CUDA_SUCCESS)
		result = look(to, size, DEVICE, &unused);
	pthread_mutex_unlock(&tables);
	return result != CUDA_SUCCESS || size == 0 ? result : submit(&operation, false);
}

API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size)
{
	return copy(to, DEVICE, (uintptr_t)from, HOST, size, NULL, true);
}

API CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size)
{
	return copy((uintptr_t)to, HOST, from, DEVICE, size, NULL, true);
}

API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size)
{
	return copy(to, DEVICE, from, DEVICE, size, NULL, true);
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream)
{
	return copy(to, DEVICE, (uintptr_t)from, HOST, size, stream, false);
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream)
{
	return copy((uintptr_t)to, HOST, from, DEVICE, size, stream, false);
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream)
{
	return copy(to, DEVICE, from, DEVICE, size, stream, false);
}

API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count)
{
	return fill(to, value, count, NULL);
}

API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream)
{
	return fill(to, value, count, stream);
}
