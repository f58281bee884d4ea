/* What C programs may ask of an open file of a trimsfs mount. */
#ifndef TRIMSFS_H
#define TRIMSFS_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define TRIMSFS_VERIFIED 1U    /* every byte is on this host and has been checked */
#define TRIMSFS_PASSTHROUGH 2U /* opens are served by the kernel from the local file */
#define TRIMSFS_PINNED 4U

/* Sizes in bytes. host is ~0 where the kernel does not tell (before Linux 6.5). */
struct trimsfs_residency {
	__u64 size;
	__u64 disk;
	__u64 host;
	__u64 flags;
};

#define TRIMSFS_IOC_RESIDENCY _IOR('t', 0x70, struct trimsfs_residency)

#define TRIMSFS_COMMON 8U /* .trims/FILE/shared tells what the file has in common with another */

/* TRIMSFS_VERIFIED and TRIMSFS_COMMON, as far as they hold, at less cost than the residency. */
#define TRIMSFS_IOC_STATE _IOR('t', 0x71, __u32)

/*
 * A piece of what a program has made of the file, size bytes in all, for other programs of the same user. Pieces come
 * in order, on one open file; with the last one it is a file of its own, .trims/FILE/derived-UID-NUMBER.
 * EBUSY: it is there, or another program is at it. ENOSPC: no room. EPERM: not on this mount. EINVAL: out of order.
 */
#define TRIMSFS_PIECE 16352

struct trimsfs_piece {
	__u64 size;
	__u64 offset;
	__u32 length;
	__u32 number;
	__u8 data[TRIMSFS_PIECE];
};

#define TRIMSFS_IOC_DERIVED _IOW('t', 0x72, struct trimsfs_piece)

/* The caller's user id as the mount knows it, which differs from its own in a user namespace. */
#define TRIMSFS_IOC_CALLER _IOR('t', 0x73, __u32)

/*
 * Load the file to a GPU, and keep the copy there until the open file is closed. device is the GPU's UUID, as
 * nvidia-smi has it. With TRIMSFS_GPU_IPC, handle is for cuIpcOpenMemHandle. With TRIMSFS_GPU_VMM, the socket gives a
 * descriptor for cuMemImportFromShareableHandle to who sends the token: see docs/gpu.md. What is where in the copy is
 * in .trims/FILE/gpu/DEVICE. size is that of the memory, nbytes of it are used.
 * ENOENT: no such device. ENOMEM: no room on it. EIO: it has failed, or the file cannot be fetched.
 */
#define TRIMSFS_GPU_VMM 0U
#define TRIMSFS_GPU_IPC 1U

struct trimsfs_gpu {
	char device[48];
	__u32 memory;
	__u32 reserved;
	__u64 size;
	__u64 nbytes;
	__u8 handle[64];
	char token[40];
	char socket[112];
};

#define TRIMSFS_IOC_GPU _IOWR('t', 0x74, struct trimsfs_gpu)

#endif
