/*
 * Finds the arrays in a mapped .params file of MXNet, and makes MXNet's arrays over them.
 *
 * A network has hundreds of arrays, so microseconds for each would dominate the time of a load. This code refuses
 * unusual files: the parser in Python reads them, or reports what is wrong.
 */
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "dlpack.h"

#define MAGIC 0x112
#define ARRAY_V2 0xF993FAC9u
#define DENSE 0
#define GPU 2
#define MOST_DIMENSIONS 32

/* As RECORD in mxnet/arrays.py. */
struct record {
	uint64_t data, nbytes, shape;
	uint64_t name, name_length;
	int32_t dimensions;
	uint8_t code, bits, unused[2];
};

/*
 * A mapping under arrays. MXNet may free the last array in any thread, even after the interpreter has ended. So freeing
 * one calls no Python: Python polls trimsfs_unused for mappings to release.
 */
struct holder {
	atomic_size_t arrays;
	uint64_t number;
	struct holder *next;
};

static _Atomic(struct holder *) unused;

/* DLPack's code and bits, by MXNet's number of a type. */
static const struct {
	uint8_t code, bits;
} TYPES[] = {{2, 32}, {2, 64}, {2, 16}, {1, 8}, {0, 32}, {0, 8}, {0, 64}, {1, 1}};

struct reader {
	const char *base;
	size_t size, at;
};

static int take(struct reader *reader, void *to, size_t size)
{
	if (size > reader->size - reader->at)
		return 0;
	memcpy(to, reader->base + reader->at, size);
	reader->at += size;
	return 1;
}

static int take_array(struct reader *reader, struct record *record)
{
	struct {
		uint32_t magic;
		int32_t storage, dimensions;
	} head;
	struct {
		int32_t device, device_number, type;
	} tail;
	int64_t shape[MOST_DIMENSIONS];
	uint64_t elements = 1;

	if (!take(reader, &head, sizeof(head)) || head.magic != ARRAY_V2 || head.storage != DENSE ||
	    head.dimensions < 1 || head.dimensions > MOST_DIMENSIONS)
		return 0;
	record->dimensions = head.dimensions;
	record->shape = (uintptr_t)reader->base + reader->at;
	if (!take(reader, shape, sizeof(*shape) * (size_t)head.dimensions) || !take(reader, &tail, sizeof(tail)) ||
	    tail.device == GPU || tail.type < 0 || (size_t)tail.type >= sizeof(TYPES) / sizeof(*TYPES))
		return 0;
	for (int32_t number = 0; number < head.dimensions; number++)
		if (shape[number] <= 0 || __builtin_mul_overflow(elements, (uint64_t)shape[number], &elements))
			return 0;
	record->code = TYPES[tail.type].code;
	record->bits = TYPES[tail.type].bits;
	size_t item = (record->bits + 7u) / 8u;
	if (__builtin_mul_overflow(elements, item, &record->nbytes) || record->nbytes > reader->size - reader->at ||
	    reader->at % item != 0)
		return 0;
	record->data = (uintptr_t)reader->base + reader->at;
	reader->at += record->nbytes;
	return 1;
}

/*
 * Fill in a record for each of a file's count arrays; names are offsets. Returns the number of names, which is count or
 * 0, or -1 for an unusual file.
 */
long trimsfs_scan(const void *base, size_t size, struct record *records, size_t count)
{
	struct reader reader = {base, size, 0};
	uint64_t head[3], names;

	if (!take(&reader, head, sizeof(head)) || head[0] != MAGIC || head[2] != count)
		return -1;
	for (size_t number = 0; number < count; number++)
		if (!take_array(&reader, &records[number]))
			return -1;
	if (!take(&reader, &names, sizeof(names)) || (names != 0 && names != count))
		return -1;
	for (size_t number = 0; number < names; number++) {
		struct record *record = &records[number];

		if (!take(&reader, &record->name_length, sizeof(record->name_length)) ||
		    record->name_length > reader.size - reader.at ||
		    memchr(reader.base + reader.at, 0, record->name_length) != NULL)
			return -1;
		record->name = reader.at;
		reader.at += record->name_length;
	}
	return (long)names;
}

static void add_unused(struct holder *holder)
{
	holder->next = atomic_load(&unused);
	while (!atomic_compare_exchange_weak(&unused, &holder->next, holder))
		;
}

static void release(struct holder *holder, size_t arrays)
{
	if (atomic_fetch_sub(&holder->arrays, arrays) == arrays)
		add_unused(holder);
}

static void array_is_gone(struct managed *array)
{
	release(array->context, 1);
}

/*
 * Make arrays from count records with MXNet's function. Returns how many it made, fewer than count when it failed, or
 * -1 without memory. When all arrays are freed, or count is 0, trimsfs_unused reports the number.
 */
long trimsfs_lend(const struct record *records, size_t count, int (*make)(struct managed *, int, void **),
		  uint64_t number, void **handles)
{
	struct holder *holder = malloc(sizeof(*holder));
	size_t made = 0;

	if (holder == NULL)
		return -1;
	holder->number = number;
	atomic_init(&holder->arrays, count + 1);
	for (; made < count && records[made].dimensions <= MOST_DIMENSIONS; made++) {
		const struct record *record = &records[made];
		int64_t shape[MOST_DIMENSIONS];
		struct managed array = {
			.tensor = {.data = (void *)(uintptr_t)record->data,
				   .device = 1,
				   .dimensions = record->dimensions,
				   .code = record->code,
				   .bits = record->bits,
				   .lanes = 1,
				   .shape = shape},
			.context = holder,
			.deleter = array_is_gone,
		};

		memcpy(shape, (const void *)(uintptr_t)record->shape, sizeof(*shape) * (size_t)record->dimensions);
		if (make(&array, 1, &handles[made]) != 0)
			break;
	}
	/* MXNet may or may not call the deleter of the array that failed: keep one reference, and so the mapping. */
	release(holder, made == count ? 1 : count - made);
	return (long)made;
}

/* Write the numbers of mappings without arrays, at most most of them and each only once; returns how many. */
size_t trimsfs_unused(uint64_t *numbers, size_t most)
{
	struct holder *holder = atomic_exchange(&unused, NULL);
	size_t written = 0;

	while (holder != NULL) {
		struct holder *next = holder->next;

		if (written < most) {
			numbers[written++] = holder->number;
			free(holder);
		} else {
			add_unused(holder);
		}
		holder = next;
	}
	return written;
}
