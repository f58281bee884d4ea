/*
 * An emulated CUDA driver for tests without a GPU: a test double at the ABI of libcuda.so.1.
 *
 * Device memory is memfds that the emulated kernel driver (kernel.py) makes, counts and hands out, so processes really
 * share memory. It computes nothing and launches no kernels. Comments say where it differs from a true driver. Tests
 * with it prove nothing about a true driver.
 *
 * CUDA's names and numbers are those of its documentation. Handles are addresses of our own structures. They are looked
 * up before use and never freed, so a stale handle is an error and not a crash.
 */
#ifndef EMULATED_H
#define EMULATED_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
#define STALE 0xA5 /* of new memory, as a true driver does not clear it; as in memory.py */
#define GRANULARITY ((size_t)2 << 20)
#define DEVICES_LIMIT 16
#define HANDLE_SIZE 64

typedef enum {
	CUDA_SUCCESS = 0,
	CUDA_ERROR_INVALID_VALUE = 1,
	CUDA_ERROR_OUT_OF_MEMORY = 2,
	CUDA_ERROR_NOT_INITIALIZED = 3,
	CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
	CUDA_ERROR_NO_DEVICE = 100,
	CUDA_ERROR_INVALID_DEVICE = 101,
	CUDA_ERROR_INVALID_CONTEXT = 201,
	CUDA_ERROR_ECC_UNCORRECTABLE = 214,
	CUDA_ERROR_PEER_ACCESS_UNSUPPORTED = 217,
	CUDA_ERROR_OPERATING_SYSTEM = 304,
	CUDA_ERROR_INVALID_HANDLE = 400,
	CUDA_ERROR_NOT_FOUND = 500,
	CUDA_ERROR_NOT_READY = 600,
	CUDA_ERROR_ILLEGAL_ADDRESS = 700,
	CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
	CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
	CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
	CUDA_ERROR_LAUNCH_FAILED = 719,
	CUDA_ERROR_NOT_PERMITTED = 800,
	CUDA_ERROR_NOT_SUPPORTED = 801,
	CUDA_ERROR_UNKNOWN = 999,
} CUresult;

typedef int CUdevice;
typedef uintptr_t CUdeviceptr;
typedef struct context *CUcontext;
typedef struct stream *CUstream;

typedef struct {
	unsigned char bytes[16];
} CUuuid;

typedef struct {
	char reserved[HANDLE_SIZE];
} CUipcMemHandle;

/* The state of a device that all processes see and tests set; as DeviceRegisters in registers.py. */
struct device_registers {
	unsigned char uuid[16];
	char name[64];
	uint64_t total;
	atomic_uint lost, paused;
	_Atomic uint64_t ns_per_copy, ps_per_byte;
	_Atomic uint64_t copies, bytes_to_device, bytes_to_host, bytes_within;
};

struct registers {
	uint64_t version, devices;
	struct device_registers device[DEVICES_LIMIT];
};

#define VERSION 1

/* Messages to the kernel driver and back; as Message in registers.py. */
enum verb { HELLO = 1, INFO, ALLOCATE, CREATE, DROP, EXPORT, IMPORT, IPC_GET, IPC_OPEN };

struct message {
	uint32_t what; /* a verb; in the answer, a CUresult */
	int32_t device;
	uint64_t number, size, more;
	unsigned char handle[HANDLE_SIZE];
};

/* The connection (wire.c). `sent` is a descriptor or -1; `received` is NULL if none comes back. */
extern struct registers *registers;
CUresult connect_kernel(void);
CUresult ask(struct message *message, int sent, int *received);
bool kernel_is_gone(void);
void forget_kernel(void);

/* Devices (devices.c): this process's ordinals, by CUDA_VISIBLE_DEVICES, and the kernel driver's numbers. */
CUresult ready(void);
CUresult find_device(CUdevice device, int *number);
CUdevice ordinal(int number);
CUresult lost(int number);

/* One mutex for all tables. Nobody holds it while waiting for a device. */
extern pthread_mutex_t tables;

static inline pthread_mutex_t *taken(pthread_mutex_t *mutex)
{
	pthread_mutex_lock(mutex);
	return mutex;
}

static inline void give(pthread_mutex_t **mutex)
{
	pthread_mutex_unlock(*mutex);
}

#define HOLD(mutex) pthread_mutex_t *held __attribute__((cleanup(give), unused)) = taken(&(mutex))
#define TRY(call) \
	do { \
		CUresult tried = (call); \
		if (tried != CUDA_SUCCESS) \
			return tried; \
	} while (0)

struct stream {
	struct context *context;
	bool legacy, nonblocking;
	struct stream *next;
};

struct context {
	int device;
	bool destroyed;
	unsigned references;
	_Atomic(CUresult) error; /* sticky, as with a true driver: the process must be restarted */
	struct stream default_stream;
	struct context *next;
};

#define STREAM_NON_BLOCKING 1u

/* Contexts (contexts.c). */
CUresult current(struct context **context);
CUresult find_context(struct context *context);
CUresult find_stream(struct stream *handle, struct stream **stream);
void forget_stacks(void);

/* Physical memory, and address ranges (ranges.c). Call with the tables held. */
struct memory {
	uint64_t number, size;
	int device, file;
	unsigned references;
	bool exportable, imported;
	struct memory *next;
};

enum kind { ALLOCATED, OPENED, MAPPING, PAGE_LOCKED, REGISTERED };
enum access { NONE = 0, READ = 1, WRITE = 2, READ_WRITE = READ | WRITE };

struct range {
	uintptr_t base;
	size_t size;
	enum kind kind;
	struct memory *memory; /* NULL: host memory */
	enum access access;
	struct context *context;
	unsigned opened;
	unsigned long long id;
	struct range *next;
};

extern bool opaque;
struct memory *add_memory(const struct message *message, int file);
void drop_memory(struct memory *memory);
uintptr_t reserve(uintptr_t hint, size_t size, size_t alignment);
CUresult protect(const struct range *range);
struct range *add_range(uintptr_t base, size_t size, enum kind kind, struct memory *memory);
void remove_range(struct range *range);
struct range *find_range(uintptr_t address);
struct range *first_range(void);
bool is_device(uintptr_t address, size_t size);
bool is_page_locked(uintptr_t address, size_t size);
void forget_memory(void);
void free_range(struct range *range);

/* The work of a stream (engine.c). */
struct operation {
	bool fill; /* else a copy */
	struct stream *stream;
	uint64_t sequence;
	uintptr_t to, from;
	bool to_device, from_device;
	size_t size;
	void *staged;
	unsigned char value;
	CUresult *told;
	struct operation *next;
};

CUresult submit(const struct operation *operation, bool wait);
CUresult finish(struct stream *stream);
CUresult finish_context(struct context *context);
void finish_device_of(uintptr_t address);
CUresult perform(const struct operation *operation);

#endif
