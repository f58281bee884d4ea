/* Streams and events. */
#include <stdlib.h>

#include "emulated.h"

#define LEGACY ((CUstream)1)
#define THREAD ((CUstream)2)

static struct stream *streams;
static struct event *events;
static unsigned long long made = 2;

/* The stream of a handle; NULL is the current context's default stream. Call with the tables held. */
CUresult find_stream(struct stream *handle, struct stream **stream)
{
	struct context *context;

	TRY(current(&context));
	if (handle == NULL || handle == LEGACY) {
		*stream = &context->default_stream;
		return CUDA_SUCCESS;
	}
	if (handle == THREAD) {
		*stream = &context->thread_stream;
		return CUDA_SUCCESS;
	}
	for (*stream = streams; *stream != NULL; *stream = (*stream)->next)
		if (*stream == handle) {
			context = handle->context;
			return context->destroyed ? CUDA_ERROR_CONTEXT_IS_DESTROYED : context->error;
		}
	return CUDA_ERROR_INVALID_HANDLE;
}

static CUresult resolve(CUstream handle, struct stream **stream)
{
	HOLD(tables);
	return find_stream(handle, stream);
}

API CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
	struct context *context;

	HOLD(tables);
	TRY(current(&context));
	if (stream == NULL || flags > STREAM_NON_BLOCKING)
		return CUDA_ERROR_INVALID_VALUE;
	*stream = calloc(1, sizeof(**stream));
	if (*stream == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	**stream = (struct stream){
		.context = context,
		.nonblocking = flags == STREAM_NON_BLOCKING,
		.priority = priority > 0 ? 0 : priority < -5 ? -5 : priority,
		.id = ++made,
		.next = streams,
	};
	streams = *stream;
	return CUDA_SUCCESS;
}

API CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
	return cuStreamCreateWithPriority(stream, flags, 0);
}

/* Finishes the stream's work first. A true driver returns at once, and finishes it later. */
API CUresult cuStreamDestroy_v2(CUstream handle)
{
	struct stream *stream;

	if (handle == NULL || handle == LEGACY || handle == THREAD)
		return CUDA_ERROR_INVALID_HANDLE;
	TRY(resolve(handle, &stream));
	finish(stream, UINT64_MAX);
	HOLD(tables);
	for (struct stream **link = &streams; *link != NULL; link = &(*link)->next)
		if (*link == stream) {
			*link = stream->next;
			return CUDA_SUCCESS;
		}
	return CUDA_ERROR_INVALID_HANDLE;
}

API CUresult cuStreamSynchronize(CUstream handle)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	return finish(stream, UINT64_MAX);
}

API CUresult cuStreamQuery(CUstream handle)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	return inquire(stream, UINT64_MAX);
}

API CUresult cuStreamGetPriority(CUstream handle, int *priority)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	*priority = stream->priority;
	return CUDA_SUCCESS;
}

API CUresult cuStreamGetFlags(CUstream handle, unsigned *flags)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	*flags = stream->nonblocking ? STREAM_NON_BLOCKING : 0;
	return CUDA_SUCCESS;
}

API CUresult cuStreamGetId(CUstream handle, unsigned long long *id)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	*id = stream->id;
	return CUDA_SUCCESS;
}

API CUresult cuStreamGetCtx(CUstream handle, CUcontext *context)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	*context = stream->context;
	return CUDA_SUCCESS;
}

API CUresult cuStreamGetDevice(CUstream handle, CUdevice *device)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	*device = ordinal(stream->context->device);
	return CUDA_SUCCESS;
}

API CUresult cuStreamIsCapturing(CUstream handle, int *status)
{
	struct stream *stream;

	TRY(resolve(handle, &stream));
	*status = 0;
	return CUDA_SUCCESS;
}

API CUresult cuLaunchHostFunc(CUstream handle, void (*function)(void *), void *argument)
{
	struct operation operation = {.task = CALL, .function = function, .argument = argument};

	TRY(resolve(handle, &operation.stream));
	return function == NULL ? CUDA_ERROR_INVALID_VALUE : submit(&operation, false);
}

/* Call with the tables held. */
static CUresult find_event(struct event *event)
{
	TRY(ready());
	for (struct event *known = events; known != NULL; known = known->next)
		if (known == event)
			return event->context->destroyed ? CUDA_ERROR_CONTEXT_IS_DESTROYED : event->context->error;
	return CUDA_ERROR_INVALID_HANDLE;
}

API CUresult cuEventCreate(CUevent *event, unsigned flags)
{
	struct context *context;

	HOLD(tables);
	TRY(current(&context));
	if (event == NULL || flags > 3) /* interprocess events are not emulated */
		return CUDA_ERROR_INVALID_VALUE;
	*event = calloc(1, sizeof(**event));
	if (*event == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	**event = (struct event){.context = context, .flags = flags, .next = events};
	events = *event;
	return CUDA_SUCCESS;
}

API CUresult cuEventDestroy_v2(CUevent event)
{
	TRY(ready());
	HOLD(tables);
	for (struct event **link = &events; *link != NULL; link = &(*link)->next)
		if (*link == event) {
			*link = event->next;
			return CUDA_SUCCESS;
		}
	return CUDA_ERROR_INVALID_HANDLE;
}

API CUresult cuEventRecord(CUevent event, CUstream handle)
{
	struct operation operation = {.task = RECORD, .event = event};

	pthread_mutex_lock(&tables);
	CUresult result = find_event(event);
	if (result == CUDA_SUCCESS)
		result = find_stream(handle, &operation.stream);
	if (result == CUDA_SUCCESS && operation.stream->context != event->context)
		result = CUDA_ERROR_INVALID_HANDLE;
	pthread_mutex_unlock(&tables);
	return result == CUDA_SUCCESS ? submit(&operation, false) : result;
}

API CUresult cuEventRecordWithFlags(CUevent event, CUstream handle, unsigned flags)
{
	(void)flags;
	return cuEventRecord(event, handle);
}

/* Take an event's stream and position, as it may be recorded again meanwhile. One never recorded counts as done. */
static CUresult locate(struct event *event, struct stream **stream, uint64_t *sequence)
{
	HOLD(tables);
	TRY(find_event(event));
	*stream = event->recorded ? event->stream : NULL;
	*sequence = event->sequence;
	return CUDA_SUCCESS;
}

API CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags)
{
	struct operation operation = {.task = AWAIT};

	(void)flags;
	TRY(locate(event, &operation.awaited, &operation.awaited_sequence));
	TRY(resolve(handle, &operation.stream));
	return operation.awaited == NULL ? CUDA_SUCCESS : submit(&operation, false);
}

API CUresult cuEventQuery(CUevent event)
{
	struct stream *stream;
	uint64_t sequence;

	TRY(locate(event, &stream, &sequence));
	return stream == NULL ? CUDA_SUCCESS : inquire(stream, sequence);
}

API CUresult cuEventSynchronize(CUevent event)
{
	struct stream *stream;
	uint64_t sequence;

	TRY(locate(event, &stream, &sequence));
	return stream == NULL ? CUDA_SUCCESS : finish(stream, sequence);
}

API CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end)
{
	HOLD(tables);
	TRY(find_event(start));
	TRY(find_event(end));
	if (milliseconds == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	if (((start->flags | end->flags) & EVENT_DISABLE_TIMING) != 0 || !start->recorded || !end->recorded)
		return CUDA_ERROR_INVALID_HANDLE;
	if (start->time_ms == 0 || end->time_ms == 0)
		return CUDA_ERROR_NOT_READY;
	*milliseconds = (float)(end->time_ms - start->time_ms);
	return CUDA_SUCCESS;
}

API CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end)
{
	return cuEventElapsedTime_v2(milliseconds, start, end);
}

/* For programs with a default stream per thread. Here, all threads of a context share that one. */
static CUstream own(CUstream handle)
{
	return handle == NULL ? THREAD : handle;
}

API CUresult cuStreamSynchronize_ptsz(CUstream handle)
{
	return cuStreamSynchronize(own(handle));
}

API CUresult cuStreamQuery_ptsz(CUstream handle)
{
	return cuStreamQuery(own(handle));
}

API CUresult cuStreamWaitEvent_ptsz(CUstream handle, CUevent event, unsigned flags)
{
	return cuStreamWaitEvent(own(handle), event, flags);
}

API CUresult cuEventRecord_ptsz(CUevent event, CUstream handle)
{
	return cuEventRecord(event, own(handle));
}

API CUresult cuEventRecordWithFlags_ptsz(CUevent event, CUstream handle, unsigned flags)
{
	return cuEventRecordWithFlags(event, own(handle), flags);
}

API CUresult cuLaunchHostFunc_ptsz(CUstream handle, void (*function)(void *), void *argument)
{
	return cuLaunchHostFunc(own(handle), function, argument);
}
