/*
 * Functions that the programs in this directory share.  They are static,
 * because each program is compiled from one file.
 */

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define EVENTS	256

static int epfd;

static inline void
die(const char *what)
{
	perror(what);
	exit(1);
}

/* op: EPOLL_CTL_ADD or EPOLL_CTL_MOD */
static inline void
watch(int fd, void *ptr, int op, unsigned events)
{
	struct epoll_event ev = { .events = events };

	ev.data.ptr = ptr;
	if (epoll_ctl(epfd, op, fd, &ev) == -1)
		die("epoll_ctl");
}

/* Begin a connection to this machine. */
static inline int
begin_connect(int port)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int fd, one = 1;

	to.sin_port = htons(port);
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if ((fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) == -1)
		die("socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)) == -1 &&
	    errno != EINPROGRESS)
		die("connect");
	return fd;
}

/* Read a file.  Zeroed bytes, as many as `spare', follow it. */
static inline char *
read_file(const char *path, size_t spare, size_t *size)
{
	struct stat st;
	FILE *file;
	char *p;

	if ((file = fopen(path, "r")) == NULL || fstat(fileno(file), &st) == -1)
		die(path);
	*size = st.st_size;
	if ((p = calloc(1, *size + spare)) == NULL)
		die("calloc");
	if (fread(p, 1, *size, file) != *size)
		die(path);
	fclose(file);
	return p;
}
