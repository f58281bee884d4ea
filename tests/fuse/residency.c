/* Prints the residency of a file: size, bytes on disk, bytes in memory, flags. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>

#include "trimsfs.h"

int main(int argc, char **argv)
{
	struct trimsfs_residency here;
	int file = argc == 2 ? open(argv[1], O_RDONLY) : -1;

	if (file < 0 || ioctl(file, TRIMSFS_IOC_RESIDENCY, &here) != 0) {
		perror("residency");
		return 1;
	}
	printf("%llu %llu %llu %llu\n", here.size, here.disk, here.host, here.flags);
	return 0;
}
