/* Names of errors, and functions by name, as programs look them up. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "emulated.h"

#define SYMBOL_NOT_FOUND 1

static const struct {
	CUresult result;
	const char *name, *meaning;
} ERRORS[] = {
#define ERROR(result, meaning) {result, #result, meaning}
	ERROR(CUDA_SUCCESS, "no error"),
	ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
	ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
	ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
	ERROR(CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable"),
	ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
	ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
	ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
	ERROR(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
	ERROR(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"),
	ERROR(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS"),
	ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
	ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
	ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
	ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
	ERROR(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
	ERROR(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
	ERROR(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
	ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
	ERROR(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
	ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
	ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

static CUresult describe(CUresult result, bool name, const char **text)
{
	for (size_t row = 0; row < sizeof(ERRORS) / sizeof(*ERRORS); row++)
		if (ERRORS[row].result == result) {
			*text = name ? ERRORS[row].name : ERRORS[row].meaning;
			return CUDA_SUCCESS;
		}
	*text = NULL;
	return CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuGetErrorName(CUresult result, const char **name)
{
	return describe(result, true, name);
}

API CUresult cuGetErrorString(CUresult result, const char **meaning)
{
	return describe(result, false, meaning);
}

/* From which CUDA version on a name means a function with a suffix, latest first. Other names have no suffix. */
static const struct {
	const char *name;
	int since;
	const char *suffix;
} VERSIONS[] = {
	{"cuDeviceTotalMem", 3020, "_v2"},
	{"cuDeviceGetUuid", 11040, "_v2"},
	{"cuDevicePrimaryCtxRelease", 11000, "_v2"},
	{"cuDevicePrimaryCtxReset", 11000, "_v2"},
	{"cuCtxPushCurrent", 4000, "_v2"},
	{"cuCtxPopCurrent", 4000, "_v2"},
	{"cuCtxGetDevice", 13000, "_v2"},
	{"cuCtxSynchronize", 13000, "_v2"},
	{"cuMemGetInfo", 3020, "_v2"},
	{"cuMemAlloc", 3020, "_v2"},
	{"cuMemFree", 3020, "_v2"},
	{"cuMemGetAddressRange", 3020, "_v2"},
	{"cuMemHostRegister", 6050, "_v2"},
	{"cuIpcOpenMemHandle", 11000, "_v2"},
	{"cuMemcpyHtoD", 3020, "_v2"},
	{"cuMemcpyDtoH", 3020, "_v2"},
	{"cuMemcpyDtoD", 3020, "_v2"},
	{"cuMemcpyHtoDAsync", 3020, "_v2"},
	{"cuMemcpyDtoHAsync", 3020, "_v2"},
	{"cuMemcpyDtoDAsync", 3020, "_v2"},
	{"cuMemsetD8", 3020, "_v2"},
	{"cuStreamDestroy", 4000, "_v2"},
	{"cuGetProcAddress", 12000, "_v2"},
};

/* The suffix of a name as of a version; empty before the versions listed. */
static const char *suffix(const char *name, int version)
{
	for (size_t row = 0; row < sizeof(VERSIONS) / sizeof(*VERSIONS); row++)
		if (strcmp(VERSIONS[row].name, name) == 0 && version >= VERSIONS[row].since)
			return VERSIONS[row].suffix;
	return "";
}

API CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
	char symbol[128];
	Dl_info self;
	void *library = NULL;

	(void)flags;
	if (name == NULL || function == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	*function = NULL;
	if (dladdr(VERSIONS, &self) != 0)
		library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
	snprintf(symbol, sizeof(symbol), "%s%s", name, suffix(name, version));
	if (library != NULL && strncmp(name, "cu", 2) == 0)
		*function = dlsym(library, symbol);
	if (library != NULL)
		dlclose(library);
	if (status != NULL)
		*status = *function != NULL ? 0 : SYMBOL_NOT_FOUND;
	return *function != NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags)
{
	return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
