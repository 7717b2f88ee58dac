/*
 * A plain TCP proxy, for comparison.  It copies bytes and does nothing else.
 * usage: proxy PORT <&SOCKET
 *
 * Standard input is a listening socket.  Each connection is passed on to PORT.
 */

#include "common.h"

#define BUFSZ	65536

/* One side of a connection.  Both sides are in one array. */
struct end {
	struct end	*other;
	char		*wait;		/* bytes not yet written */
	size_t		 at, len;
	int		 fd;
	int		 eof;		/* nothing more will be read */
};

static struct end *dead[EVENTS];	/* to free at the end of a turn */
static size_t ndead;

/* Wait for room if there are bytes to write, else for bytes to read. */
static void
interest(struct end *e)
{
	watch(e->fd, e, EPOLL_CTL_MOD, (e->len > 0 ? EPOLLOUT : 0) |
	    (e->eof || e->other->len > 0 ? 0 : EPOLLIN));
}

static void
finish(struct end *e)
{
	if (e->fd == -1)
		return;
	close(e->fd);
	close(e->other->fd);
	free(e->wait);
	free(e->other->wait);
	e->fd = e->other->fd = -1;
	dead[ndead++] = e < e->other ? e : e->other;
}

/* Write as much as fits.  Returns the number of bytes, or -1 when the
 * connection is broken. */
static ssize_t
put(struct end *e, const char *p, size_t len)
{
	ssize_t n = write(e->fd, p, len);

	return n == -1 && errno == EAGAIN ? 0 : n;
}

static void
readable(struct end *e)
{
	static char buf[BUFSZ];
	struct end *o = e->other;
	ssize_t n, done;

	n = read(e->fd, buf, sizeof(buf));
	if (n == -1 && errno == EAGAIN)
		return;
	if (n <= 0) {
		e->eof = 1;
		if (n == -1 || o->eof)
			finish(e);
		else {
			shutdown(o->fd, SHUT_WR);
			interest(e);
		}
		return;
	}
	if ((done = put(o, buf, n)) == -1) {
		finish(e);
		return;
	}
	if (done < n) {
		if ((o->wait = malloc(n - done)) == NULL)
			die("malloc");
		memcpy(o->wait, buf + done, n - done);
		o->at = 0;
		o->len = n - done;
		interest(e);
		interest(o);
	}
}

static void
writable(struct end *e)
{
	ssize_t n = put(e, e->wait + e->at, e->len);

	if (n == -1) {
		finish(e);
		return;
	}
	e->at += n;
	if ((e->len -= n) == 0) {
		free(e->wait);
		e->wait = NULL;
		interest(e);
		interest(e->other);
	}
}

static void
take(int client, int port)
{
	struct end *e;
	int i, one = 1;

	if ((e = calloc(2, sizeof(*e))) == NULL)
		die("calloc");
	e[0].other = &e[1];
	e[1].other = &e[0];
	e[0].fd = client;
	e[1].fd = begin_connect(port);
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (i = 0; i < 2; i++)
		watch(e[i].fd, &e[i], EPOLL_CTL_ADD, EPOLLIN);
}

int
main(int argc, char *argv[])
{
	struct epoll_event ev[EVENTS];
	struct end *e;
	int i, n, fd;

	if (argc != 2)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	if ((epfd = epoll_create1(0)) == -1)
		die("epoll_create1");
	watch(0, NULL, EPOLL_CTL_ADD, EPOLLIN);
	while ((n = epoll_wait(epfd, ev, EVENTS, -1)) != -1) {
		for (i = 0; i < n; i++) {
			if ((e = ev[i].data.ptr) == NULL) {
				fd = accept4(0, NULL, NULL, SOCK_NONBLOCK);
				if (fd != -1)
					take(fd, atoi(argv[1]));
				continue;
			}
			if (e->fd != -1 && e->len > 0 && ev[i].events & EPOLLOUT)
				writable(e);
			if (e->fd != -1 && !e->eof && e->other->len == 0 &&
			    ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
				readable(e);
			else if (e->fd != -1 && ev[i].events & EPOLLERR)
				finish(e);
		}
		while (ndead > 0)
			free(dead[--ndead]);
	}
	die("epoll_wait");
}
