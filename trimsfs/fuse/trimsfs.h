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

#endif
