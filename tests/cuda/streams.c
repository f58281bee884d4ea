/* Streams. */
#include <stdlib.h>

#include "emulated.h"

#define LEGACY ((CUstream)1)

static struct stream *streams;

/* The stream of a handle; NULL is the current context's default stream. Call with the tables held. */
CUresult find_stream(struct stream *handle, struct stream **stream)
{
	struct context *context;

	TRY(current(&context));
	if (handle == NULL || handle == LEGACY) {
		*stream = &context->default_stream;
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

	(void)priority;
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

	if (handle == NULL || handle == LEGACY)
		return CUDA_ERROR_INVALID_HANDLE;
	TRY(resolve(handle, &stream));
	finish(stream);
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
	return finish(stream);
}
