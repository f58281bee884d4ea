/* Kills a process at a chosen system call that changes files. LD_PRELOAD loads it into a Python that uses a cache.
 *
 * All processes map one file and count their calls in it (`struct plan`, which points.py writes). Before call number
 * `at`, the caller kills `victim` (0: itself). A process whose command line lacks $CRASH_PROGRAM does not count.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KILL, TEAR, POWER };

struct plan {
	int64_t calls; /* counted so far */
	int64_t at;    /* 0: only count */
	int64_t how;   /* KILL; TEAR: after half of the write; POWER: the file system stops, too */
	int64_t synced_at; /* before this call, the file system is synced; 0: never */
	int64_t victim;
	char directory[216]; /* on the file system that stops */
};

/* XFS_IOC_GOINGDOWN and EXT4_IOC_SHUTDOWN are the same number. The log in memory is lost, too. */
#define GOING_DOWN _IOR('X', 125, uint32_t)
#define NO_LOG_FLUSH 2

static struct plan *plan;

__attribute__((constructor)) static void load(void)
{
	const char *path = getenv("CRASH_PLAN"), *program = getenv("CRASH_PROGRAM");
	char line[4096] = "";
	int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	int self = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t length = self < 0 ? -1 : read(self, line, sizeof line - 1);

	if (self >= 0)
		close(self);
	if (file < 0 || length < 0)
		return;
	if (!program || memmem(line, (size_t)length, program, strlen(program))) {
		void *map = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);

		if (map != MAP_FAILED)
			plan = map;
	}
	close(file);
}

static void die(void)
{
	pid_t victim = plan->victim ? (pid_t)plan->victim : getpid();

	if (plan->how == POWER) {
		uint32_t flags = NO_LOG_FLUSH;
		int directory = open(plan->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

		if (directory < 0 || ioctl(directory, GOING_DOWN, &flags) != 0)
			_exit(3);
	}
	kill(victim, SIGKILL);
}

/* After a loss of power in another thread, wait: that thread is about to kill this process. */
static void wait_for_the_end(void)
{
	if (plan && plan->at && plan->how == POWER && plan->calls >= plan->at)
		sleep(10);
}

/* Count a call, and kill the victim at the chosen one. Returns 1 to have the caller write half first, and then die. */
static int point(int can_tear)
{
	if (!plan)
		return 0;
	int64_t number = __atomic_add_fetch(&plan->calls, 1, __ATOMIC_SEQ_CST);

	if (plan->synced_at && number == plan->synced_at) {
		int directory = open(plan->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

		if (directory < 0 || syncfs(directory) != 0) {
			wait_for_the_end();
			_exit(4);
		}
		close(directory);
	}
	if (!plan->at || number != plan->at)
		return 0;
	if (plan->how == TEAR && can_tear)
		return 1;
	die();
	return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t offset)
{
	__typeof__(&pwrite64) real = REAL(pwrite64);

	if (point(1)) {
		real(file, bytes, size / 2, offset);
		die();
	}
	return real(file, bytes, size, offset);
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t offset)
{
	return pwrite64(file, bytes, size, offset);
}

int ftruncate64(int file, off64_t size)
{
	point(0);
	return REAL(ftruncate64)(file, size);
}

int ftruncate(int file, off_t size)
{
	return ftruncate64(file, size);
}

int fallocate64(int file, int mode, off64_t offset, off64_t size)
{
	point(0);
	return REAL(fallocate64)(file, mode, offset, size);
}

int fallocate(int file, int mode, off_t offset, off_t size)
{
	return fallocate64(file, mode, offset, size);
}

/* ext4 may report success for a sync whose journal was stopped meanwhile. A real loss of power lets nobody see that. */
static int sync_at(int (*real)(int), int file)
{
	point(0);
	int result = real(file);

	wait_for_the_end();
	return result;
}

int fdatasync(int file)
{
	return sync_at(REAL(fdatasync), file);
}

int fsync(int file)
{
	return sync_at(REAL(fsync), file);
}

int unlink(const char *path)
{
	point(0);
	return REAL(unlink)(path);
}

int unlinkat(int directory, const char *path, int flags)
{
	point(0);
	return REAL(unlinkat)(directory, path, flags);
}

int mkdir(const char *path, mode_t mode)
{
	point(0);
	return REAL(mkdir)(path, mode);
}

#define OPEN(name)                                                                \
	int name(const char *path, int flags, ...)                                \
	{                                                                         \
		va_list rest;                                                     \
		va_start(rest, flags);                                            \
		mode_t mode = flags & O_CREAT ? (mode_t)va_arg(rest, int) : 0;    \
		va_end(rest);                                                     \
		if (flags & O_CREAT)                                              \
			point(0);                                                 \
		return REAL(name)(path, flags, mode);                             \
	}

OPEN(open)
OPEN(open64)
