/* Ioctls on an open file of a trimsfs mount, for C programs. */
#ifndef TRIMSFS_H
#define TRIMSFS_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define TRIMSFS_VERIFIED 1U    /* every byte is on this host and was verified */
#define TRIMSFS_PASSTHROUGH 2U /* the kernel serves opens from the local file */
#define TRIMSFS_PINNED 4U

/* Sizes in bytes. host is ~0 if the kernel does not tell (before Linux 6.5). */
struct trimsfs_residency {
	__u64 size;
	__u64 disk;
	__u64 host;
	__u64 flags;
};

#define TRIMSFS_IOC_RESIDENCY _IOR('t', 0x70, struct trimsfs_residency)

#define TRIMSFS_COMMON 8U /* .trims/FILE/shared lists the blocks that the file shares with another */

/* TRIMSFS_VERIFIED and TRIMSFS_COMMON, where they hold; cheaper than the residency. */
#define TRIMSFS_IOC_STATE _IOR('t', 0x71, __u32)

/*
 * Upload a piece of a blob that a program derived from the file, size bytes in all, for other programs of its user.
 * Send the pieces in order, on one open file. The last one makes the blob a file, .trims/FILE/derived-UID-NUMBER.
 * EBUSY: it exists, or somebody is uploading it. ENOSPC: no room. EPERM: not on this mount. EINVAL: out of order.
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

/* The caller's user id as the mount sees it: in a user namespace, not the one that the caller sees. */
#define TRIMSFS_IOC_CALLER _IOR('t', 0x73, __u32)

/*
 * Load the file to a GPU, and lease the copy until the open file is closed. device is the GPU's UUID, as nvidia-smi
 * prints it. With TRIMSFS_GPU_IPC, pass handle to cuIpcOpenMemHandle. With TRIMSFS_GPU_VMM, send token to socket: it
 * replies with a descriptor for cuMemImportFromShareableHandle (see docs/gpu.md). .trims/FILE/gpu/DEVICE tells the
 * layout of the copy. size is that of the memory; the copy uses nbytes of it.
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
