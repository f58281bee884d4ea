/* Initialisation, and the properties of devices. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulated.h"

#define DRIVER_VERSION 13000

pthread_mutex_t tables = PTHREAD_MUTEX_INITIALIZER;

static int visible[DEVICES_LIMIT], count;
static atomic_bool initialised, forked;

/* As with a true driver, a forked child inherits nothing. It closes the connection, which must end with its parent. */
static void become_child(void)
{
	pthread_mutex_init(&tables, NULL); /* another thread may have held it */
	if (!initialised)
		return;
	forked = true;
	forget_kernel();
	forget_memory();
}

static int named(const char *name, size_t length)
{
	char uuid[64];
	char *end;

	for (int number = 0; number < (int)registers->devices; number++) {
		int at = snprintf(uuid, sizeof(uuid), "GPU-");

		for (int byte = 0; byte < 16; byte++)
			at += snprintf(uuid + at, sizeof(uuid) - (size_t)at, "%s%02x",
				       byte == 4 || byte == 6 || byte == 8 || byte == 10 ? "-" : "",
				       registers->device[number].uuid[byte]);
		if (length > 4 && length <= (size_t)at && strncasecmp(uuid, name, length) == 0)
			return number;
	}
	long number = strtol(name, &end, 10);
	if (length == 0 || end != name + length || number < 0 || number >= (long)registers->devices)
		return -1;
	return (int)number;
}

static void see(int number)
{
	/* A device that is lost when the process starts is missing, which shifts the ordinals of later ones. */
	if (!registers->device[number].lost && count < DEVICES_LIMIT)
		visible[count++] = number;
}

/* As documented: indices or prefixes of UUIDs; the first unknown or repeated name hides all that follow. */
static void look_around(void)
{
	const char *names = getenv("CUDA_VISIBLE_DEVICES");

	count = 0;
	for (int number = 0; names == NULL && number < (int)registers->devices; number++)
		see(number);
	while (names != NULL) {
		size_t length = strcspn(names, ",");
		int number = named(names, length);

		for (int before = 0; before < count; before++)
			if (visible[before] == number)
				number = -1;
		if (number < 0)
			return;
		see(number);
		names = names[length] == ',' ? names + length + 1 : NULL;
	}
}

API CUresult cuInit(unsigned flags)
{
	static bool children;

	if (forked)
		return CUDA_ERROR_NOT_INITIALIZED;
	if (flags != 0)
		return CUDA_ERROR_INVALID_VALUE;
	HOLD(tables);
	if (initialised)
		return CUDA_SUCCESS;
	TRY(connect_kernel());
	look_around();
	if (count == 0) {
		forget_kernel();
		return CUDA_ERROR_NO_DEVICE;
	}
	opaque = getenv("EMULATED_CUDA_TRANSPARENT") == NULL;
	if (!children)
		pthread_atfork(NULL, NULL, become_child);
	children = true;
	initialised = true;
	return CUDA_SUCCESS;
}

CUresult ready(void)
{
	return initialised && !forked ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult find_device(CUdevice device, int *number)
{
	TRY(ready());
	if (device < 0 || device >= count)
		return CUDA_ERROR_INVALID_DEVICE;
	*number = visible[device];
	return CUDA_SUCCESS;
}

CUdevice ordinal(int number)
{
	for (int device = 0; device < count; device++)
		if (visible[device] == number)
			return device;
	return -1;
}

CUresult lost(int number)
{
	return (CUresult)registers->device[number].lost;
}

API CUresult cuDriverGetVersion(int *version)
{
	if (version == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	*version = DRIVER_VERSION;
	return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int *number)
{
	TRY(ready());
	if (number == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	*number = count;
	return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int number)
{
	int unused;

	TRY(find_device(number, &unused));
	if (device == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	*device = number;
	return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
	int number;

	TRY(find_device(device, &number));
	if (name == NULL || length <= 0)
		return CUDA_ERROR_INVALID_VALUE;
	snprintf(name, (size_t)length, "%s", registers->device[number].name);
	return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device)
{
	int number;

	TRY(find_device(device, &number));
	if (uuid == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	memcpy(uuid->bytes, registers->device[number].uuid, sizeof(uuid->bytes));
	return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
	return cuDeviceGetUuid(uuid, device);
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
	int number;

	TRY(find_device(device, &number));
	if (bytes == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	*bytes = registers->device[number].total;
	return CUDA_SUCCESS;
}

/* By number, as in CUdevice_attribute; the others are 0: not supported. */
static const struct {
	int attribute, value;
} ATTRIBUTES[] = {
	{1, 1024},    /* threads per block */
	{2, 1024},    /* in each dimension */
	{3, 1024},
	{4, 64},
	{5, 0x7fffffff}, /* blocks of a grid */
	{6, 65535},
	{7, 65535},
	{8, 48 << 10}, /* shared memory per block */
	{9, 64 << 10}, /* constant memory */
	{10, 32},      /* warp size */
	{12, 65536},   /* registers per block */
	{13, 1000000}, /* clock rate */
	{14, 512},     /* texture alignment */
	{15, 1},       /* copies and kernels overlap */
	{16, 1},       /* multiprocessors */
	{19, 1},       /* host memory can be mapped */
	{31, 1},       /* concurrent kernels */
	{36, 1000000}, /* memory clock rate */
	{37, 256},     /* bus width */
	{39, 2048},    /* threads per multiprocessor */
	{40, 2},       /* copy engines */
	{41, 1},       /* unified addressing */
	{75, 9},       /* compute capability 9.0 */
	{76, 0},
	{78, 1}, /* stream priorities */
	{99, 1}, /* host memory can be registered */
	{102, 1}, /* virtual memory management */
	{103, 1}, /* its handles can be file descriptors */
	{113, 1}, /* host memory can be registered read-only */
};

API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
	int number;

	TRY(find_device(device, &number));
	if (value == NULL || attribute < 1 || attribute > 200)
		return CUDA_ERROR_INVALID_VALUE;
	*value = attribute == 33 ? number : 0; /* its number on the PCI bus */
	for (size_t row = 0; row < sizeof(ATTRIBUTES) / sizeof(*ATTRIBUTES); row++)
		if (ATTRIBUTES[row].attribute == attribute)
			*value = ATTRIBUTES[row].value;
	return CUDA_SUCCESS;
}
