/* DLPack's tensor, and the structure by which version 0 passes it on. */
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
