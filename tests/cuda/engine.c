/*
 * What streams have to do, and when it is done.
 *
 * Copies are put off until something waits for them: a program that does not wait sees what it did before the copy, or
 * copies what it has put into the buffer since. Every device has one engine, which whoever waits for it works, in an
 * order that streams and events allow; nobody who holds one waits for another, so that a device which stands still
 * keeps back only those who wait for it.
 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "emulated.h"

bool eager;

struct engine {
	pthread_mutex_t mutex;
	struct operation *first; /* with the tables held; what is under way is still there */
};

static struct engine engines[DEVICES_LIMIT] = {[0 ... DEVICES_LIMIT - 1] = {.mutex = PTHREAD_MUTEX_INITIALIZER}};
static uint64_t submitted; /* with the tables held */

/* Which operations of a device: of a stream; of all streams of a context that heed its default stream; or all. */
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

/* The oldest; it stays what it is while the engine is held, and NULL means that all are done. */
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

static bool run(const struct choice *choice, struct choice *elsewhere);

/* Run what an operation comes after. False as for `run`. */
static bool run_before(const struct operation *operation, struct choice *elsewhere)
{
	struct stream *stream = operation->stream;
	struct choice before = stream->legacy ?
		of_context(stream->context, false, operation->sequence - 1) :
		of_stream(&stream->context->default_stream, operation->sequence - 1);

	if (!stream->nonblocking && !run(&before, elsewhere))
		return false;
	if (operation->task != AWAIT)
		return true;
	struct choice awaited = of_stream(operation->awaited, operation->awaited_sequence);
	if (awaited.device == stream->context->device)
		return run(&awaited, elsewhere);
	*elsewhere = awaited;
	return oldest(&awaited) == NULL;
}

/* With the engine held. False when another device has to do something first, which *elsewhere then is. */
static bool run(const struct choice *choice, struct choice *elsewhere)
{
	struct operation *operation;

	while ((operation = oldest(choice)) != NULL) {
		struct context *context = operation->stream->context;

		if (!run_before(operation, elsewhere))
			return false;
		CUresult result = context->error == CUDA_SUCCESS ? perform(operation) : context->error;
		if (operation->told != NULL)
			*operation->told = result;
		/* What the host gave is wrong, the device is well; but one that is not waited for can tell nobody. */
		if (result != CUDA_SUCCESS && (result != CUDA_ERROR_INVALID_VALUE || operation->told == NULL))
			context->error = result;
		end(&engines[choice->device], operation);
	}
	return true;
}

static bool run_here(const struct choice *choice, struct choice *elsewhere)
{
	HOLD(engines[choice->device].mutex);
	return run(choice, elsewhere);
}

static void run_now(const struct choice *choice)
{
	struct choice elsewhere;

	while (!run_here(choice, &elsewhere))
		run_now(&elsewhere);
}

/* Put something at the end of a stream; a copy of it. Its result comes back where it is waited for. */
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
	if (added->task == RECORD) {
		added->event->recorded = true;
		added->event->time_ms = 0;
		added->event->stream = added->stream;
		added->event->sequence = added->sequence;
	}
	struct operation **link = &engines[choice.device].first;
	while (*link != NULL)
		link = &(*link)->next;
	*link = added;
	pthread_mutex_unlock(&tables);
	if (wait || eager)
		run_now(&choice);
	return result;
}

/* What a stream has done when it has come so far; the default stream, when all that heed it have. */
static struct choice everything(struct stream *stream, uint64_t upto)
{
	return stream->legacy && upto == UINT64_MAX ? of_context(stream->context, false, upto) :
						      of_stream(stream, upto);
}

CUresult finish(struct stream *stream, uint64_t upto)
{
	struct choice choice = everything(stream, upto);

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
 * For memory that is about to go. A true driver waits for its device, and may wait for more; that it does not is to
 * show what a device which stands still keeps back.
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

/*
 * Whether a stream has come so far. The first time that something is asked for it is still under way, the second time
 * it is done: so programs that ask see both, and those that ask until it is done come to an end. Nobody who only asks
 * waits for a device that stands still.
 */
CUresult inquire(struct stream *stream, uint64_t upto)
{
	struct choice choice = everything(stream, upto), elsewhere = {.stream = NULL};
	struct engine *engine = &engines[choice.device];
	bool pending = false, known = !stands_still(choice.device);

	if (pthread_mutex_trylock(&engine->mutex) == EBUSY)
		return CUDA_ERROR_NOT_READY;
	pthread_mutex_lock(&tables);
	for (struct operation *operation = engine->first; operation != NULL; operation = operation->next)
		if (chosen(&choice, operation)) {
			pending = true;
			known = known && operation->asked;
			operation->asked = true;
		}
	pthread_mutex_unlock(&tables);
	bool done = !pending || (known && run(&choice, &elsewhere));
	pthread_mutex_unlock(&engine->mutex);
	if (!done && known)
		inquire(elsewhere.stream, elsewhere.upto);
	return done ? stream->context->error : CUDA_ERROR_NOT_READY;
}
