/*
 * Adds what pyfuse3 lacks: passthrough, noflush, ioctl, interrupts of open, the thread of a read, non-blocking reads of
 * /dev/fuse, and answers without a task. It can also continue a connection that another process began.
 *
 * Loaded RTLD_GLOBAL before pyfuse3, this library defines some of libfuse's functions. It gets pyfuse3's calls of these
 * and passes them on to the real ones, slightly changed. The changes depend on numbers that the server itself chose, so
 * this library keeps no table:
 *   - a file handle with a backing id in its upper half is opened in passthrough mode;
 *   - for a listed number with NAME_ONLY_BIT, the kernel gets the name and the number, but no inode.
 *
 * Callbacks run in the thread that processes requests, which holds the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 312
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "trimsfs.h"

#ifndef FUSE_UNIQUE_RESEND
#define FUSE_UNIQUE_RESEND (UINT64_C(1) << 63)
#endif
#define NAME_ONLY_BIT (UINT64_C(1) << 63)
#define BACKING_SHIFT 32

/*
 * After an immediate answer, a program often sends its next request within microseconds, sooner than the event loop
 * comes round. Wait this long for it while no other request is in flight, and answer requests this long before the loop
 * has its turn.
 */
#define NEXT_WITHIN_NS 50000
#define PASS_NS 1000000

static struct {
	int passthrough;
	int hide_threads;
	unsigned int stack_depth;
	unsigned int max_background;
	PyObject *on_lookup;
	PyObject *on_open;
	PyObject *on_used;
	PyObject *on_ioctl;
	PyObject *on_interrupt;
	PyObject *on_asked_again;
	PyObject *on_offered;
	PyObject *on_opened;
	PyObject *on_release;
	PyObject *is_idle;
} wanted;

static struct {
	int interposed;
	int passthrough;
	int direct;
	int resends;
	unsigned int minor;
	void *init;
	size_t init_size;
} agreed;

static struct fuse_session *session;

/* The kernel's number of the current request, and its offset in libfuse's request (0: not known yet). */
static uint64_t processed;
static size_t unique_at;

/* The id of the thread that made the current request. */
static uint32_t processed_for;

/* Whether the current request is answered, or needs no answer, and leaves nothing to the event loop. */
static int settled;

/* pyfuse3's operations, and ours that wrap them. */
static struct fuse_lowlevel_ops inner, outer;

/* libfuse's function of a name; a plain dlsym would find this library's own. */
static void *real(const char *name)
{
	static void *library;
	Dl_info info;
	void *function;

	if (library == NULL && dladdr((void *)(uintptr_t)fuse_session_exit, &info) != 0)
		library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
	function = library == NULL ? NULL : dlsym(library, name);
	if (function == NULL)
		Py_FatalError("libfuse lacks a function that it is known to have");
	return function;
}

#define REAL(type, name)                          \
	static type function;                     \
	if (function == NULL)                     \
		*(void **)&function = real(name); \
	return function

/* Drop what a callback returned, or report what it raised. */
static void finish(PyObject *result, PyObject *callback)
{
	if (result == NULL)
		PyErr_WriteUnraisable(callback);
	Py_XDECREF(result);
}

static void call(PyObject *callback, uint64_t number)
{
	finish(PyObject_CallFunction(callback, "K", (unsigned long long)number), callback);
}

/* Operations */

static void wrapped_init(void *userdata, struct fuse_conn_info *conn)
{
	inner.init(userdata, conn);
	agreed.minor = conn->proto_minor;
	conn->max_background = wanted.max_background;
	conn->congestion_threshold = wanted.max_background / 4 * 3;
#ifdef FUSE_CAP_PASSTHROUGH
	if (wanted.passthrough && fuse_set_feature_flag(conn, FUSE_CAP_PASSTHROUGH)) {
		agreed.passthrough = 1;
		conn->max_backing_stack_depth = wanted.stack_depth;
	}
	agreed.direct = fuse_set_feature_flag(conn, FUSE_CAP_DIRECT_IO_ALLOW_MMAP);
	/* Or lookups in one directory wait for each other in the kernel, also for one that waits for the store. */
	fuse_set_feature_flag(conn, FUSE_CAP_PARALLEL_DIROPS);
#else
	conn->want |= conn->capable & FUSE_CAP_PARALLEL_DIROPS;
#endif
}

static void on_interrupt(fuse_req_t req, void *data)
{
	PyObject *result;

	(void)req;
	result = PyObject_CallFunction(wanted.on_interrupt, "l", (long)(intptr_t)data);
	finish(result, wanted.on_interrupt);
}

/*
 * libfuse does not tell a request's number. Look for it in the request itself: it has always been right after the
 * session. If it is not there, resent opens cannot be matched with handles.
 */
static void find_unique(fuse_req_t req)
{
	uint64_t word;

	memcpy(&word, (const char *)req + sizeof(void *), sizeof(word));
	if (unique_at == 0 && word == processed)
		unique_at = sizeof(void *);
	else if (unique_at != 0 && word != processed)
		unique_at = SIZE_MAX; /* the first match was chance */
}

static uint64_t unique_of(fuse_req_t req)
{
	uint64_t word = 0;

	if (unique_at != 0 && unique_at != SIZE_MAX)
		memcpy(&word, (const char *)req + unique_at, sizeof(word));
	return word & ~FUSE_UNIQUE_RESEND;
}

static void wrapped_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	find_unique(req);
	inner.opendir(req, ino, fi);
}

/* Answer a lookup of a known name at once; leave any other to pyfuse3. */
static void wrapped_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = {0};
	unsigned long long number, size;
	long long modified;
	long block;
	PyObject *result;

	result = PyObject_CallFunction(wanted.on_lookup, "KyI", (unsigned long long)parent, name,
				      (unsigned int)fuse_req_ctx(req)->pid);
	if (result == NULL || result == Py_None ||
	    !PyArg_ParseTuple(result, "KddIIIKlL", &number, &entry.entry_timeout, &entry.attr_timeout,
			      &entry.attr.st_mode, &entry.attr.st_uid, &entry.attr.st_gid, &size,
			      &block, &modified)) {
		if (PyErr_Occurred())
			PyErr_WriteUnraisable(wanted.on_lookup);
		inner.lookup(req, parent, name);
	} else {
		entry.ino = entry.attr.st_ino = number;
		entry.attr.st_nlink = 1;
		entry.attr.st_size = (off_t)size;
		entry.attr.st_blksize = (blksize_t)block;
		entry.attr.st_blocks = (blkcnt_t)((size + 511) / 512);
		entry.attr.st_mtim.tv_sec = modified / 1000000000;
		entry.attr.st_mtim.tv_nsec = modified % 1000000000;
		entry.attr.st_atim = entry.attr.st_ctim = entry.attr.st_mtim;
		settled = 1;
		fuse_reply_entry(req, &entry);
	}
	Py_XDECREF(result);
}

static int reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	REAL(__typeof__(&fuse_reply_open), "fuse_reply_open")(req, fi);
}

/* Answer an open with a handle that is recorded as offered; release the handle if the kernel does not take it. */
static int deliver(fuse_req_t req, const struct fuse_file_info *fi)
{
	struct fuse_file_info ours = *fi;
	int failure;

	ours.noflush = 1; /* read-only: a close has nothing to flush */
#ifdef FUSE_CAP_PASSTHROUGH
	ours.backing_id = (int32_t)(fi->fh >> BACKING_SHIFT);
	if (ours.backing_id != 0)
		ours.keep_cache = 0;
#endif
	failure = reply_open(req, &ours);
	/* The caller is gone, so the kernel will not release the handle. */
	if (failure != 0)
		call(wanted.on_release, fi->fh);
	return failure;
}

/* Answer an open in passthrough mode at once, if the file is ready. Returns whether it did. */
static int opened_at_once(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct fuse_ctx by = *fuse_req_ctx(req);
	PyObject *handle, *result;

	if ((fi->flags & O_ACCMODE) != O_RDONLY)
		return 0;
	handle = PyObject_CallFunction(wanted.on_open, "KK", (unsigned long long)ino,
				       (unsigned long long)unique_of(req));
	if (handle == NULL || handle == Py_None) {
		finish(handle, wanted.on_open);
		return 0;
	}
	fi->fh = PyLong_AsUnsignedLongLong(handle);
	Py_DECREF(handle);
	settled = 1;
	if (deliver(req, fi) == 0) {
		result = PyObject_CallFunction(wanted.on_used, "KIII", (unsigned long long)fi->fh, (unsigned int)by.pid,
					       (unsigned int)by.uid, (unsigned int)by.gid);
		finish(result, wanted.on_used);
	}
	return 1;
}

static void wrapped_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	find_unique(req);
	if (opened_at_once(req, ino, fi))
		return;
	/* A thread waits for one open at a time, so its id names the request. */
	if (wanted.on_interrupt != NULL && fuse_req_ctx(req)->pid != 0)
		fuse_req_interrupt_func(req, on_interrupt, (void *)(intptr_t)fuse_req_ctx(req)->pid);
	inner.open(req, ino, fi);
}

static void wrapped_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	settled = 1;
	call(wanted.on_release, fi->fh);
	fuse_reply_err(req, 0);
}

static void wrapped_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, void *arg, struct fuse_file_info *fi,
			  unsigned int flags, const void *in, size_t in_size, size_t out_size)
{
	PyObject *result;

	(void)arg;
	(void)out_size;
	if (wanted.on_ioctl == NULL || (flags & FUSE_IOCTL_DIR) != 0) {
		fuse_reply_err(req, ENOTTY);
		return;
	}
	if (cmd == TRIMSFS_IOC_GPU && wanted.on_interrupt != NULL && fuse_req_ctx(req)->pid != 0)
		fuse_req_interrupt_func(req, on_interrupt, (void *)(intptr_t)fuse_req_ctx(req)->pid);
	result = PyObject_CallFunction(wanted.on_ioctl, "KKKIIIy#", (unsigned long long)(uintptr_t)req,
				       (unsigned long long)ino, (unsigned long long)fi->fh,
				       (unsigned int)fuse_req_ctx(req)->uid, (unsigned int)fuse_req_ctx(req)->pid, cmd,
				       (const char *)in, (Py_ssize_t)in_size);
	if (result == NULL)
		fuse_reply_err(req, EIO);
	settled = result == Py_True;
	finish(result, wanted.on_ioctl);
}

static void wrap(const struct fuse_lowlevel_ops *ops, size_t size)
{
	memset(&inner, 0, sizeof(inner));
	memcpy(&inner, ops, size < sizeof(inner) ? size : sizeof(inner));
	outer = inner;
	outer.init = wrapped_init;
	outer.lookup = wrapped_lookup;
	outer.open = wrapped_open;
	outer.opendir = wrapped_opendir;
	outer.release = wrapped_release;
	outer.ioctl = wrapped_ioctl;
	agreed.interposed = 1;
}

/* Functions of libfuse */

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
static struct fuse_session *real_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
					     struct libfuse_version *version, void *userdata)
{
	REAL(__typeof__(&fuse_session_new_versioned), "fuse_session_new_versioned")
	(args, op, op_size, version, userdata);
}

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
						size_t op_size, struct libfuse_version *version, void *userdata)
{
	wrap(op, op_size);
	return session = real_session_new(args, &outer, sizeof(outer), version, userdata);
}
#else
static struct fuse_session *real_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
					     void *userdata)
{
	REAL(__typeof__(&fuse_session_new), "fuse_session_new")(args, op, op_size, userdata);
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
				      void *userdata)
{
	wrap(op, op_size);
	return session = real_session_new(args, &outer, sizeof(outer), userdata);
}
#endif

static int receive(struct fuse_session *from, struct fuse_buf *buf)
{
	REAL(__typeof__(&fuse_session_receive_buf), "fuse_session_receive_buf")(from, buf);
}

static void process(struct fuse_session *by, const struct fuse_buf *buf)
{
	REAL(__typeof__(&fuse_session_process_buf), "fuse_session_process_buf")(by, buf);
}

/* Keep the first message, which is INIT: a process that continues the connection needs it. */
static void keep_init(const void *message, size_t size)
{
	const struct fuse_init_in *terms = (const void *)((const char *)message + sizeof(struct fuse_in_header));

	if (agreed.init != NULL || size < sizeof(struct fuse_in_header) + sizeof(*terms))
		return;
	agreed.init = malloc(size);
	if (agreed.init == NULL)
		return;
	memcpy(agreed.init, message, size);
	agreed.init_size = size;
#ifdef FUSE_HAS_RESEND
	agreed.resends = (terms->flags2 & (uint32_t)(FUSE_HAS_RESEND >> 32)) != 0;
#endif
}

static int has_header(const struct fuse_buf *buf, struct fuse_in_header *header)
{
	if (buf->size < sizeof(*header) || (buf->flags & FUSE_BUF_IS_FD) != 0)
		return 0;
	memcpy(header, buf->mem, sizeof(*header));
	return 1;
}

/*
 * Note the request that is about to be processed. First report an open that the kernel sends again. A thread of a PID
 * namespace that this process does not see becomes 0: here, its number is another thread's.
 */
static void note(const struct fuse_buf *buf)
{
	struct fuse_in_header header;

	if (has_header(buf, &header)) {
		if (wanted.hide_threads) {
			header.pid = 0;
			memcpy(buf->mem, &header, sizeof(header));
		}
		processed = header.unique;
		processed_for = header.pid;
		if ((header.unique & FUSE_UNIQUE_RESEND) != 0 && wanted.on_asked_again != NULL &&
		    (header.opcode == FUSE_OPEN || header.opcode == FUSE_OPENDIR))
			call(wanted.on_asked_again, header.unique & ~FUSE_UNIQUE_RESEND);
	}
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Whether another request is here; if no other is in flight, also whether one comes within NEXT_WITHIN_NS. */
static int comes_next(struct fuse_session *from)
{
	struct pollfd connection = {.fd = fuse_session_fd(from), .events = POLLIN};
	struct timespec wait = {0};
	PyObject *idle;
	int ready;

	idle = PyObject_CallNoArgs(wanted.is_idle);
	if (idle == Py_True)
		wait.tv_nsec = NEXT_WITHIN_NS;
	finish(idle, wanted.is_idle);
	Py_BEGIN_ALLOW_THREADS;
	ready = ppoll(&connection, 1, &wait, NULL);
	Py_END_ALLOW_THREADS;
	return ready > 0;
}

/*
 * Process a request, and the next ones while they leave nothing to the event loop. The loop takes longer to come round
 * than such a request takes. The buffer is pyfuse3's, which does not use it afterwards.
 */
void fuse_session_process_buf(struct fuse_session *by, const struct fuse_buf *buf)
{
	struct fuse_buf *next = (struct fuse_buf *)(uintptr_t)buf;
	uint64_t end = now_ns() + PASS_NS;

	do {
		note(buf);
		settled = 0;
		process(by, buf);
	} while (settled && now_ns() < end && comes_next(by) && receive(by, next) > 0);
}

/*
 * Reads of /dev/fuse do not block: the kernel may have withdrawn the request that made it readable. pyfuse3 takes EINTR
 * as "nothing to read", but EAGAIN as a failure.
 */
int fuse_session_receive_buf(struct fuse_session *from, struct fuse_buf *buf)
{
	int size = receive(from, buf);

	if (size == -EAGAIN)
		return -EINTR;
	if (size > 0 && agreed.init == NULL)
		keep_init(buf->mem, (size_t)size);
	return size;
}

int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	PyObject *result = PyObject_CallFunction(wanted.on_offered, "KK", (unsigned long long)fi->fh,
						 (unsigned long long)unique_of(req));
	int failure;

	finish(result, wanted.on_offered);
	failure = deliver(req, fi);
	if (failure == 0)
		call(wanted.on_opened, fi->fh);
	return failure;
}

static int reply_buf(fuse_req_t req, const char *buf, size_t size)
{
	REAL(__typeof__(&fuse_reply_buf), "fuse_reply_buf")(req, buf, size);
}

/*
 * The bytes are a mapping of the local file: read them into memory first. The kernel takes the request off its list
 * before it copies the bytes. If it then waits for a page and this process is killed, the request fails.
 */
int fuse_reply_buf(fuse_req_t req, const char *buf, size_t size)
{
#ifdef MADV_POPULATE_READ
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)buf & ~(page - 1);

	if (size >= page) {
		Py_BEGIN_ALLOW_THREADS;
		(void)madvise((void *)first, (uintptr_t)buf + size - first, MADV_POPULATE_READ);
		Py_END_ALLOW_THREADS;
	}
#endif
	return reply_buf(req, buf, size);
}

size_t fuse_add_direntry_plus(fuse_req_t req, char *buf, size_t size, const char *name,
			      const struct fuse_entry_param *entry, off_t off)
{
	struct fuse_entry_param ours = *entry;

	if (ours.ino & NAME_ONLY_BIT)
		ours.ino = 0;
	ours.attr.st_ino &= ~NAME_ONLY_BIT;
	REAL(__typeof__(&fuse_add_direntry_plus), "fuse_add_direntry_plus")(req, buf, size, name, &ours, off);
}

/* The Python module */

static PyObject *configure(PyObject *self, PyObject *args, PyObject *named)
{
	static char *names[] = {"passthrough", "hide_threads", "stack_depth",    "max_background", "on_lookup",
				"on_open",     "on_used",      "on_ioctl",       "on_interrupt",   "on_asked_again",
				"on_offered",  "on_opened",    "on_release",     "is_idle",        NULL};
	PyObject **kept[] = {&wanted.on_lookup,	   &wanted.on_open,	   &wanted.on_used,
			     &wanted.on_ioctl,	   &wanted.on_interrupt,   &wanted.on_asked_again,
			     &wanted.on_offered,   &wanted.on_opened,	   &wanted.on_release,
			     &wanted.is_idle};
	PyObject *given[sizeof(kept) / sizeof(*kept)];
	unsigned int stack_depth, max_background;
	int passthrough, hide_threads;

	(void)self;
	if (!PyArg_ParseTupleAndKeywords(args, named, "$ppIIOOOOOOOOOO", names, &passthrough, &hide_threads, &stack_depth,
					 &max_background, &given[0], &given[1], &given[2], &given[3], &given[4],
					 &given[5], &given[6], &given[7], &given[8], &given[9]))
		return NULL;
	wanted.passthrough = passthrough;
	wanted.hide_threads = hide_threads;
	wanted.stack_depth = stack_depth;
	wanted.max_background = max_background;
	for (size_t place = 0; place < sizeof(kept) / sizeof(*kept); place++)
		Py_XSETREF(*kept[place], Py_NewRef(given[place]));
	Py_RETURN_NONE;
}

static PyObject *connection(PyObject *self, PyObject *args)
{
	(void)self;
	(void)args;
	return Py_BuildValue("{s:O,s:O,s:O,s:O,s:I}", "interposed", agreed.interposed ? Py_True : Py_False, "passthrough",
			     agreed.passthrough ? Py_True : Py_False, "direct", agreed.direct ? Py_True : Py_False, "resends",
			     agreed.resends ? Py_True : Py_False, "minor", agreed.minor);
}

static PyObject *init_message(PyObject *self, PyObject *args)
{
	(void)self;
	(void)args;
	return PyBytes_FromStringAndSize(agreed.init, (Py_ssize_t)agreed.init_size);
}

/* Make libfuse continue a connection as if the kernel had just begun it; the kernel ignores the answer. */
static PyObject *replay_init(PyObject *self, PyObject *args)
{
	struct fuse_buf buf = {0};
	Py_buffer message;

	(void)self;
	if (!PyArg_ParseTuple(args, "y*", &message))
		return NULL;
	keep_init(message.buf, (size_t)message.len);
	if (session == NULL || agreed.init == NULL) {
		PyBuffer_Release(&message);
		PyErr_SetString(PyExc_ValueError, "no session, or no INIT message");
		return NULL;
	}
	buf.mem = agreed.init;
	buf.size = agreed.init_size;
	process(session, &buf);
	PyBuffer_Release(&message);
	Py_RETURN_NONE;
}

static PyObject *thread(PyObject *self, PyObject *args)
{
	(void)self;
	(void)args;
	return PyLong_FromUnsignedLong(processed_for);
}

static PyObject *reply_ioctl(PyObject *self, PyObject *args)
{
	unsigned long long request;
	Py_buffer data;
	int result;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ky*", &request, &data))
		return NULL;
	result = fuse_reply_ioctl((fuse_req_t)(uintptr_t)request, 0, data.buf, (size_t)data.len);
	PyBuffer_Release(&data);
	return PyLong_FromLong(result);
}

static PyObject *reply_error(PyObject *self, PyObject *args)
{
	unsigned long long request;
	int number;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ki", &request, &number))
		return NULL;
	return PyLong_FromLong(fuse_reply_err((fuse_req_t)(uintptr_t)request, number));
}

static PyMethodDef methods[] = {
	{"configure", (PyCFunction)(void *)configure, METH_VARARGS | METH_KEYWORDS, NULL},
	{"connection", connection, METH_NOARGS, NULL},
	{"init_message", init_message, METH_NOARGS, NULL},
	{"replay_init", replay_init, METH_VARARGS, NULL},
	{"thread", thread, METH_NOARGS, NULL},
	{"reply_ioctl", reply_ioctl, METH_VARARGS, NULL},
	{"reply_error", reply_error, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "_libfuse",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__libfuse(void)
{
	PyObject *module = PyModule_Create(&definition);

	if (module == NULL)
		return NULL;
	if (PyModule_AddIntConstant(module, "IOC_RESIDENCY", (long)TRIMSFS_IOC_RESIDENCY) < 0 ||
	    PyModule_AddIntConstant(module, "IOC_STATE", (long)TRIMSFS_IOC_STATE) < 0 ||
	    PyModule_AddIntConstant(module, "IOC_DERIVED", (long)TRIMSFS_IOC_DERIVED) < 0 ||
	    PyModule_AddIntConstant(module, "IOC_GPU", (long)TRIMSFS_IOC_GPU) < 0 ||
	    PyModule_AddIntConstant(module, "IOC_CALLER", (long)TRIMSFS_IOC_CALLER) < 0 ||
	    PyModule_AddStringConstant(module, "LIBFUSE", fuse_pkgversion()) < 0 ||
	    PyModule_AddIntConstant(module, "PASSTHROUGH_BUILT",
#ifdef FUSE_CAP_PASSTHROUGH
				    1
#else
				    0
#endif
				    ) < 0) {
		Py_DECREF(module);
		return NULL;
	}
	return module;
}
