/* Tensors as DLPack describes them, and what version 0 lends them by. */
#ifndef TRIMSFS_DLPACK_H
#define TRIMSFS_DLPACK_H

#include <stdint.h>

struct tensor {
	void *data;
	int32_t device, device_number;
	int32_t dimensions;
	uint8_t code, bits;
	uint16_t lanes;
	int64_t *shape, *strides;
	uint64_t offset;
};

struct managed {
	struct tensor tensor;
	void *context;
	void (*deleter)(struct managed *);
};

#endif
