/* The primary contexts, which are the only ones, and the current one of each thread. */
#include <stdlib.h>

#include "emulated.h"

#define STACK_LIMIT 64

static struct context *contexts;
static _Thread_local struct context *stack[STACK_LIMIT];
static _Thread_local int depth;

/* Call with the tables held, as for primary and end. */
static struct context *make(int device)
{
	struct context *context = calloc(1, sizeof(*context));

	if (context == NULL)
		return NULL;
	context->device = device;
	context->default_stream = (struct stream){.context = context, .legacy = true};
	context->next = contexts;
	contexts = context;
	return context;
}

static struct context *primary(int device)
{
	struct context *context = contexts;

	while (context != NULL && context->device != device)
		context = context->next;
	return context;
}

/* End a context and free its allocations. Memory of cuMemCreate belongs to the process and stays. */
static void end(struct context *context)
{
	struct range *next;

	for (struct context **link = &contexts; *link != NULL; link = &(*link)->next)
		if (*link == context) {
			*link = context->next;
			break;
		}
	context->destroyed = true;
	for (struct range *range = first_range(); range != NULL; range = next) {
		next = range->next;
		if (range->context == context && range->kind != MAPPING)
			free_range(range);
	}
}

CUresult find_context(struct context *context)
{
	for (struct context *known = contexts; known != NULL; known = known->next)
		if (known == context)
			return CUDA_SUCCESS;
	return CUDA_ERROR_INVALID_CONTEXT;
}

/* The calling thread's context, or its error. Call with the tables held. */
CUresult current(struct context **context)
{
	TRY(ready());
	if (depth == 0 || stack[depth - 1] == NULL)
		return CUDA_ERROR_INVALID_CONTEXT;
	*context = stack[depth - 1];
	if ((*context)->destroyed)
		return CUDA_ERROR_CONTEXT_IS_DESTROYED;
	if ((*context)->error == CUDA_SUCCESS)
		(*context)->error = lost((*context)->device);
	return (*context)->error;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *handle, CUdevice device)
{
	int number;

	TRY(find_device(device, &number));
	if (handle == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	TRY(lost(number));
	HOLD(tables);
	struct context *context = primary(number);
	if (context == NULL && (context = make(number)) == NULL)
		return CUDA_ERROR_OUT_OF_MEMORY;
	context->references++;
	*handle = context;
	return CUDA_SUCCESS;
}

static CUresult leave(CUdevice device, bool all)
{
	struct context *context;
	int number;

	TRY(find_device(device, &number));
	pthread_mutex_lock(&tables);
	context = primary(number);
	bool last = context != NULL && (all || context->references == 1);
	if (context != NULL && !last)
		context->references--;
	pthread_mutex_unlock(&tables);
	if (!last)
		return context != NULL || all ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
	finish_context(context);
	HOLD(tables);
	end(context);
	return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
	return leave(device, false);
}

API CUresult cuDevicePrimaryCtxReset_v2(CUdevice device)
{
	return leave(device, true);
}

API CUresult cuCtxPushCurrent_v2(CUcontext context)
{
	TRY(ready());
	HOLD(tables);
	TRY(find_context(context));
	if (depth == STACK_LIMIT)
		return CUDA_ERROR_INVALID_VALUE;
	stack[depth++] = context;
	return CUDA_SUCCESS;
}

API CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
	TRY(ready());
	if (depth == 0)
		return CUDA_ERROR_INVALID_CONTEXT;
	depth--;
	if (context != NULL)
		*context = stack[depth];
	return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext context)
{
	TRY(ready());
	HOLD(tables);
	if (context == NULL) {
		depth -= depth > 0;
		return CUDA_SUCCESS;
	}
	TRY(find_context(context));
	depth += depth == 0;
	stack[depth - 1] = context;
	return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext *context)
{
	TRY(ready());
	if (context == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	*context = depth == 0 ? NULL : stack[depth - 1];
	return CUDA_SUCCESS;
}

/* Check a context; NULL stands for the calling thread's. */
static CUresult given(struct context **context)
{
	TRY(ready());
	HOLD(tables);
	return *context == NULL ? current(context) : find_context(*context);
}

API CUresult cuCtxGetDevice_v2(CUdevice *device, CUcontext context)
{
	TRY(given(&context));
	if (device == NULL)
		return CUDA_ERROR_INVALID_VALUE;
	*device = ordinal(context->device);
	return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice *device)
{
	return cuCtxGetDevice_v2(device, NULL);
}

API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
	if (least != NULL)
		*least = 0;
	if (greatest != NULL)
		*greatest = -5;
	return ready();
}

API CUresult cuCtxSynchronize_v2(CUcontext context)
{
	TRY(given(&context));
	return finish_context(context);
}

API CUresult cuCtxSynchronize(void)
{
	return cuCtxSynchronize_v2(NULL);
}
