/*
 * The work of streams, and when it is done.
 *
 * Copies are deferred until somebody waits for them. So a program that forgets to wait reads old bytes, or copies bytes
 * that it wrote to the buffer later. Each device has one engine. Whoever waits for the device runs the engine, in an
 * order that streams allow. Nobody who holds one engine waits for another, so a paused device delays only those who
 * wait for it.
 */
#include <stdlib.h>

#include "emulated.h"

struct engine {
	pthread_mutex_t mutex;
	struct operation *first; /* with the tables held; includes the running operation */
};

static struct engine engines[DEVICES_LIMIT] = {[0 ... DEVICES_LIMIT - 1] = {.mutex = PTHREAD_MUTEX_INITIALIZER}};
static uint64_t submitted; /* with the tables held */

/* Chosen operations of a device: of a stream, of the blocking streams of a context, of a whole context, or all. */
struct choice {
	int device;
	struct context *context;
	struct stream *stream;
	bool all;
	uint64_t upto;
};

static struct choice of_stream(struct stream *stream, uint64_t upto)
{
	return (struct choice){.device = stream->context->device, .stream = stream, .upto = upto};
}

static struct choice of_context(struct context *context, bool all, uint64_t upto)
{
	return (struct choice){.device = context->device, .context = context, .all = all, .upto = upto};
}

static bool chosen(const struct choice *choice, const struct operation *operation)
{
	if (operation->sequence > choice->upto)
		return false;
	if (choice->stream != NULL)
		return operation->stream == choice->stream;
	return choice->context == NULL || (operation->stream->context == choice->context &&
					   (choice->all || !operation->stream->nonblocking));
}

/* The oldest chosen operation, which does not change while the engine is held; NULL when all are done. */
static struct operation *oldest(const struct choice *choice)
{
	HOLD(tables);
	struct operation *operation = engines[choice->device].first;
	while (operation != NULL && !chosen(choice, operation))
		operation = operation->next;
	return operation;
}

static void end(struct engine *engine, struct operation *operation)
{
	HOLD(tables);
	struct operation **link = &engine->first;
	while (*link != operation)
		link = &(*link)->next;
	*link = operation->next;
	free(operation->staged);
	free(operation);
}

static void run(const struct choice *choice);

/* Run the operations that must precede this one. */
static void run_before(const struct operation *operation)
{
	struct stream *stream = operation->stream;
	struct choice before = stream->legacy ?
		of_context(stream->context, false, operation->sequence - 1) :
		of_stream(&stream->context->default_stream, operation->sequence - 1);

	if (!stream->nonblocking)
		run(&before);
}

/* Call with the engine held. */
static void run(const struct choice *choice)
{
	struct operation *operation;

	while ((operation = oldest(choice)) != NULL) {
		struct context *context = operation->stream->context;

		run_before(operation);
		CUresult result = context->error == CUDA_SUCCESS ? perform(operation) : context->error;
		if (operation->told != NULL)
			*operation->told = result;
		/* A wrong argument leaves the device well, but if nobody waits, only the context can report it. */
		if (result != CUDA_SUCCESS && (result != CUDA_ERROR_INVALID_VALUE || operation->told == NULL))
			context->error = result;
		end(&engines[choice->device], operation);
	}
}

static void run_now(const struct choice *choice)
{
	HOLD(engines[choice->device].mutex);
	run(choice);
}

/* Append a copy of an operation to its stream. Returns its result if the caller waits, else success. */
CUresult submit(const struct operation *operation, bool wait)
{
	struct operation *added = malloc(sizeof(*added));
	struct choice choice = of_stream(operation->stream, 0);
	CUresult result = CUDA_SUCCESS;

	if (added == NULL) {
		free(operation->staged);
		return CUDA_ERROR_OUT_OF_MEMORY;
	}
	*added = *operation;
	added->next = NULL;
	added->told = wait ? &result : NULL;
	pthread_mutex_lock(&tables);
	added->sequence = choice.upto = ++submitted;
	struct operation **link = &engines[choice.device].first;
	while (*link != NULL)
		link = &(*link)->next;
	*link = added;
	pthread_mutex_unlock(&tables);
	if (wait)
		run_now(&choice);
	return result;
}

/* The operations of a stream; of the default stream, also those of the blocking streams. */
static struct choice everything(struct stream *stream)
{
	return stream->legacy ? of_context(stream->context, false, UINT64_MAX) : of_stream(stream, UINT64_MAX);
}

CUresult finish(struct stream *stream)
{
	struct choice choice = everything(stream);

	run_now(&choice);
	return stream->context->error;
}

CUresult finish_context(struct context *context)
{
	struct choice choice = of_context(context, true, UINT64_MAX);

	run_now(&choice);
	return context->error;
}

/*
 * Wait for the device of memory that is about to be freed. A true driver may wait for more. This one does not, so that
 * tests see exactly what a paused device delays.
 */
void finish_device_of(uintptr_t address)
{
	struct choice choice = {.upto = UINT64_MAX};

	pthread_mutex_lock(&tables);
	const struct range *range = find_range(address);
	if (range != NULL)
		choice.device = range->memory != NULL ? range->memory->device : range->context->device;
	pthread_mutex_unlock(&tables);
	if (range != NULL)
		run_now(&choice);
}
