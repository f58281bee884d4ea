/* The connection to the emulated kernel driver: one request and its answer at a time. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "emulated.h"

struct registers *registers;

static int connection = -1;
static pthread_mutex_t wire = PTHREAD_MUTEX_INITIALIZER;

static bool send_message(const struct message *message, int sent)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} rights;
	struct iovec part = {.iov_base = (void *)(uintptr_t)message, .iov_len = sizeof(*message)};
	struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
	ssize_t count;

	if (sent >= 0) {
		header.msg_control = rights.bytes;
		header.msg_controllen = sizeof(rights.bytes);
		struct cmsghdr *control = CMSG_FIRSTHDR(&header);
		control->cmsg_level = SOL_SOCKET;
		control->cmsg_type = SCM_RIGHTS;
		control->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(control), &sent, sizeof(int));
	}
	do
		count = sendmsg(connection, &header, MSG_NOSIGNAL);
	while (count < 0 && errno == EINTR);
	return count == (ssize_t)sizeof(*message);
}

static bool receive_message(struct message *message, int *received)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} rights;
	struct iovec part = {.iov_base = message, .iov_len = sizeof(*message)};
	struct msghdr header = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = rights.bytes,
		.msg_controllen = sizeof(rights.bytes),
	};
	ssize_t count;
	int file = -1;

	do
		count = recvmsg(connection, &header, MSG_CMSG_CLOEXEC);
	while (count < 0 && errno == EINTR);
	if (count != (ssize_t)sizeof(*message))
		return false;
	struct cmsghdr *control = CMSG_FIRSTHDR(&header);
	if (control != NULL && control->cmsg_type == SCM_RIGHTS)
		memcpy(&file, CMSG_DATA(control), sizeof(int));
	if (received != NULL)
		*received = file;
	else if (file >= 0)
		close(file);
	return received == NULL || message->what != CUDA_SUCCESS || file >= 0;
}

/* Send a request and wait; the message becomes the answer. */
CUresult ask(struct message *message, int sent, int *received)
{
	HOLD(wire);
	if (connection < 0 || !send_message(message, sent) || !receive_message(message, received))
		return CUDA_ERROR_UNKNOWN;
	return (CUresult)message->what;
}

/* Whether the kernel driver has ended: then nobody waits for its devices any more. */
bool kernel_is_gone(void)
{
	struct pollfd end = {.fd = connection, .events = 0};

	return poll(&end, 1, 0) != 0;
}

CUresult connect_kernel(void)
{
	const char *path = getenv("EMULATED_CUDA");
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct message hello = {.what = HELLO, .number = VERSION};
	int file;

	if (path == NULL || strlen(path) >= sizeof(address.sun_path))
		return CUDA_ERROR_NO_DEVICE;
	strcpy(address.sun_path, path);
	connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (connection < 0)
		return CUDA_ERROR_OPERATING_SYSTEM;
	if (connect(connection, (const struct sockaddr *)&address, sizeof(address)) == 0 &&
	    ask(&hello, -1, &file) == CUDA_SUCCESS) {
		registers = mmap(NULL, sizeof(*registers), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		close(file);
		if (registers != MAP_FAILED && registers->version == VERSION)
			return CUDA_SUCCESS;
	}
	forget_kernel();
	return CUDA_ERROR_NO_DEVICE;
}

void forget_kernel(void)
{
	close(connection);
	connection = -1;
}
