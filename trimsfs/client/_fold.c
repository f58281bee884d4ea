/*
 * A step of folding: compares a part of memory with a part of a file, and maps the file there where they are equal.
 *
 * Plain C, loaded by ctypes, so that a framework's own threads can execute it. It needs no GIL, runs no finalizers, and
 * may run after the interpreter has ended.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

struct step {
	char *here;
	char *there;
	size_t size;
	size_t least;
	int file;
	off_t offset;
	atomic_int owners;
	atomic_int done;
	size_t shared;
};

static pthread_mutex_t executing = PTHREAD_MUTEX_INITIALIZER;
static int stopped;
static atomic_int writers;
static atomic_int folding;

static void in_child(void)
{
	/* The child has only the forking thread: no other thread would ever release these. */
	pthread_mutex_init(&executing, NULL);
	atomic_store(&writers, 0);
	atomic_store(&folding, 0);
}

__attribute__((constructor)) static void loaded(void)
{
	pthread_atfork(NULL, NULL, in_child);
}

/* Drop one of a step's two owners, its maker and its executor; the last frees the step. */
void trimsfs_release(void *argument)
{
	struct step *step = argument;

	if (atomic_fetch_sub(&step->owners, 1) != 1)
		return;
	munmap(step->there, step->size);
	close(step->file);
	free(step);
}

/*
 * Make a step that maps a file's bytes at offset over [here, here + size), in equal parts of at least least bytes.
 * Returns NULL and sets errno when the file's part cannot be read into memory.
 */
void *trimsfs_step(void *here, size_t size, int file, off_t offset, size_t least)
{
	struct step *step = calloc(1, sizeof(*step));
	int error;

	if (step == NULL)
		return NULL;
	step->here = here;
	step->size = size;
	step->least = least;
	step->offset = offset;
	atomic_init(&step->owners, 2);
	step->file = fcntl(file, F_DUPFD_CLOEXEC, 0);
	step->there = step->file < 0 ? MAP_FAILED : mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, offset);
	/* Read it now: nobody waits for the step yet, and a failed read is an error here but SIGBUS later. */
	if (step->there != MAP_FAILED && madvise(step->there, size, MADV_POPULATE_READ) == 0)
		return step;
	error = errno;
	if (step->there != MAP_FAILED)
		munmap(step->there, size);
	if (step->file >= 0)
		close(step->file);
	free(step);
	errno = error;
	return NULL;
}

static void share(struct step *step, size_t begin, size_t size)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), half = size / 2 / page * page;

	if (memcmp(step->here + begin, step->there + begin, size) == 0) {
		if (mmap(step->here + begin, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, step->file,
			 step->offset + (off_t)begin) != MAP_FAILED)
			step->shared += size;
	} else if (half >= step->least) {
		share(step, begin, half);
		share(step, begin + half, size - half);
	}
}

/* Execute a step. The caller ensures that nobody writes to its part of memory meanwhile. */
void trimsfs_execute(void *context, void *argument)
{
	struct step *step = argument;

	(void)context;
	pthread_mutex_lock(&executing);
	atomic_store(&folding, 1);
	if (!stopped && atomic_load(&writers) == 0)
		share(step, 0, step->size);
	atomic_store(&folding, 0);
	pthread_mutex_unlock(&executing);
	atomic_store(&step->done, 1);
}

/* Return the bytes that an executed step has shared; -1 before it is executed. */
long trimsfs_shared(void *argument)
{
	struct step *step = argument;

	return atomic_load(&step->done) ? (long)step->shared : -1;
}

/* Make all later steps do nothing. */
void trimsfs_stop(void)
{
	pthread_mutex_lock(&executing);
	stopped = 1;
	pthread_mutex_unlock(&executing);
}

/* Begin to write outside of the framework's engine: wait for a running step; later steps do nothing until the end. */
void trimsfs_begin_write(void)
{
	atomic_fetch_add(&writers, 1);
	while (atomic_load(&folding))
		sched_yield();
}

void trimsfs_end_write(void)
{
	atomic_fetch_sub(&writers, 1);
}
