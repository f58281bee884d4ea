/* Performs the operations of streams. It reads and writes device memory as files, so nothing here can fault. */
#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "emulated.h"

#define PIECE ((size_t)256 << 10)

/* Use with the device's engine held. */
static unsigned char buffers[DEVICES_LIMIT][PIECE];

static double now_ms(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

/* Sleep until a copy that began at start_ms is due at the speed set by tests, and while they pause the device. */
static void dawdle(const struct device_registers *device, double start_ms, size_t bytes)
{
	const struct timespec moment = {.tv_nsec = 1000000};

	while (!device->lost && !kernel_is_gone()) {
		double due_ms = (double)device->ns_per_copy / 1e6 + (double)device->ps_per_byte * (double)bytes / 1e9;

		if (!device->paused && now_ms() - start_ms >= due_ms)
			return;
		nanosleep(&moment, NULL);
	}
}

/* A piece of device memory with a reference, until let_go. */
struct piece {
	struct memory *memory;
	off_t offset;
	size_t size;
};

static CUresult resolve(uintptr_t address, size_t size, enum access wanted, struct piece *piece)
{
	HOLD(tables);
	struct range *range = find_range(address);
	if (range == NULL || range->memory == NULL || (range->access & wanted) != wanted)
		return CUDA_ERROR_ILLEGAL_ADDRESS;
	TRY(lost(range->memory->device));
	size_t offset = address - range->base, left = range->size - offset;
	piece->memory = range->memory;
	piece->memory->references++;
	piece->offset = (off_t)offset;
	piece->size = size < left ? size : left;
	return CUDA_SUCCESS;
}

static void let_go(const struct piece *piece)
{
	HOLD(tables);
	drop_memory(piece->memory);
}

/* No bytes: the owner of the memory is gone. EFAULT: the caller passed host memory that cannot be accessed. */
static CUresult judged(ssize_t count)
{
	if (count > 0)
		return CUDA_SUCCESS;
	return count < 0 && errno == EFAULT ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_ILLEGAL_ADDRESS;
}

/* Copy from the device to the host, or back. Sets *size to the bytes copied. */
static CUresult transfer(uintptr_t device, uintptr_t host, size_t *size, bool to_device)
{
	struct piece piece;
	ssize_t count;

	TRY(resolve(device, *size, to_device ? WRITE : READ, &piece));
	struct device_registers *registered = &registers->device[piece.memory->device];
	if (to_device)
		count = pwrite(piece.memory->file, (const void *)host, piece.size, piece.offset);
	else
		count = pread(piece.memory->file, (void *)host, piece.size, piece.offset);
	CUresult result = judged(count);
	let_go(&piece);
	if (result == CUDA_SUCCESS) {
		*size = (size_t)count;
		atomic_fetch_add(to_device ? &registered->bytes_to_device : &registered->bytes_to_host, *size);
	}
	return result;
}

/* Copy within or between devices, through a buffer; counts as bytes_within. Sets *size to the bytes copied. */
static CUresult move(uintptr_t to, uintptr_t from, size_t *size, unsigned char *buffer)
{
	struct piece source, target;
	size_t most = *size < PIECE ? *size : PIECE;

	TRY(resolve(from, most, READ, &source));
	CUresult result = judged(pread(source.memory->file, buffer, source.size, source.offset));
	let_go(&source);
	TRY(result);
	TRY(resolve(to, source.size, WRITE, &target));
	result = judged(pwrite(target.memory->file, buffer, target.size, target.offset));
	if (result == CUDA_SUCCESS)
		atomic_fetch_add(&registers->device[target.memory->device].bytes_within, *size = target.size);
	let_go(&target);
	return result;
}

static CUresult copy(const struct operation *operation)
{
	struct device_registers *device = &registers->device[operation->stream->context->device];
	double start = now_ms();

	atomic_fetch_add(&device->copies, 1);
	for (size_t done = 0, size; done < operation->size; done += size) {
		uintptr_t to = operation->to + done, from = operation->from + done;

		size = operation->size - done < PIECE ? operation->size - done : PIECE;
		dawdle(device, start, done + size);
		if (operation->to_device && operation->from_device)
			TRY(move(to, from, &size, buffers[operation->stream->context->device]));
		else if (operation->to_device)
			TRY(transfer(to, from, &size, true));
		else
			TRY(transfer(from, to, &size, false));
	}
	return CUDA_SUCCESS;
}

static CUresult fill(const struct operation *operation)
{
	unsigned char *buffer = buffers[operation->stream->context->device];

	memset(buffer, operation->value, PIECE);
	for (size_t done = 0; done < operation->size;) {
		size_t left = operation->size - done;
		struct piece piece;

		TRY(resolve(operation->to + done, left < PIECE ? left : PIECE, WRITE, &piece));
		CUresult result = judged(pwrite(piece.memory->file, buffer, piece.size, piece.offset));
		let_go(&piece);
		TRY(result);
		done += piece.size;
	}
	return CUDA_SUCCESS;
}

/* Call with the engine held. */
CUresult perform(const struct operation *operation)
{
	CUresult gone = lost(operation->stream->context->device);

	if (gone != CUDA_SUCCESS)
		return gone;
	return operation->fill ? fill(operation) : copy(operation);
}
