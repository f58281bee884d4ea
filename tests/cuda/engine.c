/*
 * What streams have to do, and when it is done.
 *
 * Copies are put off until something waits for them: a program that does not wait sees what it did before the copy, or
 * copies what it has put into the buffer since. One mutex stands for the one engine that all devices here have: whoever
 * waits does the work, in an order that streams and events allow.
 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "emulated.h"

bool eager;

static pthread_mutex_t engine = PTHREAD_MUTEX_INITIALIZER;
/* With the tables held. */
static struct operation *first;
static uint64_t submitted;

/* Which operations: of a stream, or, for NULL, of all streams of a context that heed its default stream. */
struct choice {
	struct context *context;
	struct stream *stream;
	bool all;
	uint64_t upto;
};

static bool chosen(const struct choice *choice, const struct operation *operation)
{
	if (operation->sequence > choice->upto)
		return false;
	if (choice->stream != NULL)
		return operation->stream == choice->stream;
	return choice->context == NULL || (operation->stream->context == choice->context &&
					   (choice->all || !operation->stream->nonblocking));
}

static struct operation *take(const struct choice *choice)
{
	HOLD(tables);
	for (struct operation **link = &first; *link != NULL; link = &(*link)->next)
		if (chosen(choice, *link)) {
			struct operation *operation = *link;

			*link = operation->next;
			return operation;
		}
	return NULL;
}

/* With the engine held. */
static void run(const struct choice *choice)
{
	struct operation *operation;

	while ((operation = take(choice)) != NULL) {
		struct context *context = operation->stream->context;
		struct choice before = {.context = context, .upto = operation->sequence};

		if (!operation->stream->legacy)
			before.stream = &context->default_stream;
		if (!operation->stream->nonblocking)
			run(&before);
		if (operation->task == AWAIT) {
			struct choice awaited = {.stream = operation->awaited, .upto = operation->awaited_sequence};

			run(&awaited);
		}
		CUresult result = context->error == CUDA_SUCCESS ? perform(operation) : context->error;
		if (operation->told != NULL)
			*operation->told = result;
		/* What the host gave is wrong, the device is well; but one that is not waited for can tell nobody. */
		if (result != CUDA_ERROR_INVALID_VALUE || operation->told == NULL)
			context->error = result;
		free(operation->staged);
		free(operation);
	}
}

static CUresult run_now(const struct choice *choice, struct context *context)
{
	HOLD(engine);
	run(choice);
	return context == NULL ? CUDA_SUCCESS : context->error;
}

/* Put something at the end of a stream; a copy of it. Its result comes back where it is waited for. */
CUresult submit(const struct operation *operation, bool wait)
{
	struct operation *added = malloc(sizeof(*added));
	struct choice choice = {.stream = operation->stream};
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
	struct operation **link = &first;
	while (*link != NULL)
		link = &(*link)->next;
	*link = added;
	pthread_mutex_unlock(&tables);
	if (wait || eager)
		run_now(&choice, NULL);
	return result;
}

/* What a stream has done when it has come so far; the default stream, when all that heed it have. */
static struct choice everything(struct stream *stream, uint64_t upto)
{
	if (stream->legacy && upto == UINT64_MAX)
		return (struct choice){.context = stream->context, .upto = upto};
	return (struct choice){.stream = stream, .upto = upto};
}

CUresult finish(struct stream *stream, uint64_t upto)
{
	struct choice choice = everything(stream, upto);

	return run_now(&choice, stream->context);
}

CUresult finish_context(struct context *context)
{
	struct choice choice = {.context = context, .all = true, .upto = UINT64_MAX};

	return run_now(&choice, context);
}

void finish_all(void)
{
	struct choice choice = {.upto = UINT64_MAX};

	run_now(&choice, NULL);
}

/*
 * Whether a stream has come so far. The first time that something is asked for it is still under way, the second time
 * it is done: so programs that ask see both, and those that ask until it is done come to an end.
 */
CUresult inquire(struct stream *stream, uint64_t upto)
{
	struct choice choice = everything(stream, upto);
	bool pending = false, known = true;

	if (pthread_mutex_trylock(&engine) == EBUSY)
		return CUDA_ERROR_NOT_READY;
	pthread_mutex_lock(&tables);
	for (struct operation *operation = first; operation != NULL; operation = operation->next)
		if (chosen(&choice, operation)) {
			pending = true;
			known = known && operation->asked;
			operation->asked = true;
		}
	pthread_mutex_unlock(&tables);
	if (pending && known)
		run(&choice);
	pthread_mutex_unlock(&engine);
	return pending && !known ? CUDA_ERROR_NOT_READY : stream->context->error;
}
