/*
 * Makes DLPack capsules over memory that a Python object owns.
 *
 * In C because of the deleter. It may be called in any thread, after the interpreter has ended, or during an exception
 * (which a Python function would lose).
 */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "dlpack.h"

#define MAJOR 1
#define MINOR 1
#define READ_ONLY 1

static const char PLAIN[] = "dltensor";
static const char VERSIONED[] = "dltensor_versioned";

/* Since version 1. */
struct versioned {
	uint32_t major, minor;
	void *context;
	void (*deleter)(struct versioned *);
	uint64_t flags;
	struct tensor tensor;
};

/* The content of a capsule: one of the two, whose context points back here, and the shape and strides. */
struct lent {
	PyObject *owner;
	union {
		struct managed managed;
		struct versioned versioned;
	};
	int64_t sizes[];
};

static void give_back(struct lent *lent)
{
	PyObject *type, *value, *traceback;
	PyGILState_STATE state;

	if (!Py_IsInitialized()) /* the process is ending: the kernel frees everything */
		return;
	state = PyGILState_Ensure();
	PyErr_Fetch(&type, &value, &traceback);
	Py_DecRef(lent->owner);
	PyErr_Restore(type, value, traceback);
	free(lent);
	PyGILState_Release(state);
}

/* Frameworks may pass a copy of the structure, so use only its context. */
static void delete_managed(struct managed *managed)
{
	give_back(managed->context);
}

static void delete_versioned(struct versioned *versioned)
{
	give_back(versioned->context);
}

/* Destroy a capsule. A consumer renames the capsule that it takes, and calls the deleter itself. */
static void destroy(PyObject *capsule)
{
	if (PyCapsule_IsValid(capsule, PLAIN))
		delete_managed(PyCapsule_GetPointer(capsule, PLAIN));
	else if (PyCapsule_IsValid(capsule, VERSIONED))
		delete_versioned(PyCapsule_GetPointer(capsule, VERSIONED));
}

/* Make a capsule of a dense tensor; type is its code, bits and lanes. Returns NULL with an exception set on failure. */
PyObject *trimsfs_capsule(
	PyObject *owner, void *data, const int32_t device[2], const uint16_t type[3], const int64_t *shape,
	int32_t dimensions, int versioned, int read_only)
{
	size_t count = (size_t)dimensions;
	struct lent *lent = calloc(1, sizeof(*lent) + 2 * count * sizeof(int64_t));
	struct tensor *tensor;
	PyObject *capsule;
	int64_t stride = 1;

	if (!lent)
		return PyErr_NoMemory();
	tensor = versioned ? &lent->versioned.tensor : &lent->managed.tensor;
	tensor->data = data;
	tensor->device = device[0];
	tensor->device_number = device[1];
	tensor->dimensions = dimensions;
	tensor->code = (uint8_t)type[0];
	tensor->bits = (uint8_t)type[1];
	tensor->lanes = type[2];
	tensor->shape = lent->sizes;
	tensor->strides = lent->sizes + count;
	memcpy(tensor->shape, shape, count * sizeof(*shape));
	for (size_t number = count; number-- > 0;) {
		tensor->strides[number] = stride;
		stride *= shape[number] > 1 ? shape[number] : 1;
	}
	if (versioned) {
		lent->versioned.major = MAJOR;
		lent->versioned.minor = MINOR;
		lent->versioned.context = lent;
		lent->versioned.deleter = delete_versioned;
		lent->versioned.flags = read_only ? READ_ONLY : 0;
		capsule = PyCapsule_New(&lent->versioned, VERSIONED, destroy);
	} else {
		lent->managed.context = lent;
		lent->managed.deleter = delete_managed;
		capsule = PyCapsule_New(&lent->managed, PLAIN, destroy);
	}
	if (!capsule) {
		free(lent);
		return NULL;
	}
	lent->owner = owner;
	Py_IncRef(owner);
	return capsule;
}
