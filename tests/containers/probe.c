/* A program in a container that uses a model, or tries to break out. Statically linked, so that it runs in any image.
 *
 *   probe map FILE           map FILE, touch every page, print the sum and wait to be killed
 *   probe attributes PATH    print the names and values of PATH's extended attributes
 *   probe handle HEX PATH    open a file handle of the host (KIND:HEX) on the mount of PATH
 *   probe writable PATH      remount PATH writable, and write a file in it
 *   probe connect PATH       connect to a SOCK_SEQPACKET socket, and send a message
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

static int failed(const char *what)
{
    printf("%s: %s\n", what, strerror(errno));
    return 1;
}

static int map(const char *path)
{
    struct stat status;
    int file = open(path, O_RDONLY);
    unsigned long sum = 0;
    if (file < 0 || fstat(file, &status) != 0)
        return failed("open");
    volatile unsigned char *bytes = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0);
    if (bytes == MAP_FAILED)
        return failed("mmap");
    for (off_t at = 0; at < status.st_size; at += 4096)
        sum += bytes[at];
    printf("mapped %lu\n", sum);
    fflush(stdout);
    for (;;)
        pause();
}

static int attributes(const char *path)
{
    char names[65536], value[65536];
    ssize_t size = listxattr(path, names, sizeof names);
    if (size < 0)
        return failed("listxattr");
    for (char *name = names; name < names + size; name += strlen(name) + 1) {
        ssize_t length = getxattr(path, name, value, sizeof value);
        printf("%s=%.*s\n", name, length < 0 ? 0 : (int)length, value);
    }
    return 0;
}

static int handle(const char *hex, const char *path)
{
    struct { struct file_handle head; unsigned char rest[MAX_HANDLE_SZ]; } handle;
    int kind, used = 0, mount = open(path, O_RDONLY | O_DIRECTORY);
    if (mount < 0)
        return failed("open");
    if (sscanf(hex, "%d:%n", &kind, &used) != 1)
        return 2;
    hex += used;
    handle.head.handle_type = kind;
    handle.head.handle_bytes = (unsigned)strlen(hex) / 2;
    for (unsigned at = 0; at < handle.head.handle_bytes && at < MAX_HANDLE_SZ; at++)
        sscanf(hex + 2 * at, "%2hhx", &handle.head.f_handle[at]);
    if (open_by_handle_at(mount, &handle.head, O_RDONLY) < 0)
        return failed("open_by_handle_at");
    puts("opened");
    return 0;
}

static int writable(const char *path)
{
    if (mount("none", path, NULL, MS_REMOUNT | MS_BIND, NULL) != 0)
        return failed("remount");
    if (chdir(path) != 0 || open("intruder", O_CREAT | O_WRONLY, 0644) < 0)
        return failed("write");
    puts("written");
    return 0;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int end = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (end < 0 || connect(end, (struct sockaddr *)&address, sizeof address) != 0)
        return failed("connect");
    if (send(end, "hello", 5, 0) != 5)
        return failed("send");
    puts("connected");
    return 0;
}

int main(int count, char **arguments)
{
    if (count == 3 && strcmp(arguments[1], "map") == 0)
        return map(arguments[2]);
    if (count == 3 && strcmp(arguments[1], "attributes") == 0)
        return attributes(arguments[2]);
    if (count == 4 && strcmp(arguments[1], "handle") == 0)
        return handle(arguments[2], arguments[3]);
    if (count == 3 && strcmp(arguments[1], "writable") == 0)
        return writable(arguments[2]);
    if (count == 3 && strcmp(arguments[1], "connect") == 0)
        return connect_to(arguments[2]);
    return 2;
}
