/*
 * clamsmtpd: the loop, listeners, signals, the status page, start-up.
 *
 * A pass of the loop: collect() puts every descriptor and deadline of interest
 * into an empty poll set.  poll_wait() sleeps, and calls the functions of those
 * that are ready, which read, write and run sessions.  Then the sessions run
 * whose time has come or that others have woken, and those that have ended are
 * freed.  Nothing is freed earlier in a pass.
 */

#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "clamsmtpd.h"

/* Linux options for IPv4 and IPv6, which old headers of libc do not define. */
#define IPV4_TRANSPARENT	19
#define IPV6_IS_TRANSPARENT	75

#define BACKLOG		4096	/* above libc's SOMAXCONN */
#define ACCEPTS		64		/* from one listener in one pass */
#define PAUSE_TIME	SECOND		/* without accept() after it failed */
#define STORE_NAME	"clamsmtpd_"	/* of listeners in systemd's store */
#define NOTIFY_TIME	(5 * SECOND)	/* for room at systemd, at the start */
#define MAXHTTP		8		/* clients of the status page */
#define HTTP_TIME	(10 * SECOND)	/* for each of them */
#define REQUESTSZ	4096		/* bytes of an HTTP request */

/* For the start only. */
#define die(status, ...)	do {			\
	logmsg(LOG_ERR, __VA_ARGS__);			\
	exit(status);					\
} while (0)

static struct conf *conf;		/* the settings in effect */
static const char *given[128];		/* options; "": without an argument */
static const char *flags[64][2];	/* from old flags: setting, value */
static int nflags;
static int pid_fd = -1;			/* of the pid file, locked; -1: none */
static int sandboxed;
static int stopping;			/* signals to stop; 2: stop at once */
static int64_t drain_until;		/* when to stop at the latest */
static int64_t begin_until;		/* last time for a busy client to begin */

/*
 * The loop.
 */

static void on_signals(void *, int), watchdog_poll(void), http_poll(void),
    listeners_poll(void), handle_signals(void);
static int sigpipe[2];			/* of on_signal() to on_signals() */

/* Build the poll set, in the order in which those that are ready are served:
 * sessions, which may end and make room, before new clients.  in_vain: nothing
 * of the last set was ready. */
static void
collect(int in_vain)
{
	poll_add(sigpipe[0], POLLIN, on_signals, NULL);
	watchdog_poll();
	clamd_poll();
	http_poll();
	sessions_poll(in_vain);
	listeners_poll();
	if (stopping)
		poll_deadline(now < begin_until ? begin_until : drain_until);
}

static int
is_over(void)
{
	return stopping > 1 || (stopping && count.open == 0 &&
	    (now >= drain_until || virusactions == 0));
}

static void
loop(void)
{
	int ready = 1;

	log_wait = 0;
	while (!is_over()) {
		collect(ready == 0);
		ready = poll_wait();
		sessions_run();
		handle_signals();
		sessions_reap();
	}
}

/*
 * Listeners.
 */

enum use { NONE, SESSIONS, STATUS };

struct listener {
	int	 fd;			/* -1: shut to make room for another */
	enum use use;			/* by the settings in effect; NONE: new */
	enum use wanted;		/* by new settings; NONE: to close */
	struct addr asked;		/* of the setting; its port may be 0 */
	struct addr addr;
	int	 v6only;		/* [::], and IPv4 has a line of its own */
	int	 foreign;		/* a socket unit's, not made by us */
	struct listener *next;
};
static struct listener *listeners;
static int64_t paused_until;		/* no accept() before this */

static void http_accept(int);
static void notify(const char *, int);
static int listen_fds(void);
static int has_store;			/* systemd keeps descriptors for us */

static void
on_accept(void *arg, int revents)
{
	static int complained;
	struct listener *l = arg;
	struct addr a;
	int fd, i;

	(void)revents;
	for (i = 0; i < ACCEPTS; i++) {
		memset(&a, 0, sizeof a);
		a.len = sizeof a.u;
		fd = accept4(l->fd, &a.u.sa, &a.len,
		    SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd == -1)
			break;
		complained = 0;
		if (a.u.sa.sa_family == AF_UNIX)	/* its path is not used */
			a.len = offsetof(struct sockaddr_un, sun_path);
		addr_unmap(&a);
		if (l->use == STATUS)
			http_accept(fd);
		else
			session_accept(fd, &a, conf);
	}
	if (i == ACCEPTS || errno == EAGAIN || errno == ECONNABORTED ||
	    errno == EINTR)
		return;
	if (!complained)
		logmsg(LOG_ERR, "%s: accept:", addr_full(&l->addr));
	complained = 1;
	paused_until = now + PAUSE_TIME;
}

static void
listeners_poll(void)
{
	struct listener *l;

	if (now < paused_until) {
		poll_deadline(paused_until);
		return;
	}
	for (l = listeners; l != NULL; l = l->next)
		poll_add(l->fd, POLLIN, on_accept, l);
}

static int
is_socket(const char *path)
{
	struct stat st;

	return lstat(path, &st) == 0 && S_ISSOCK(st.st_mode);
}

/* 0666: the directory of the path restricts access. */
static int
path_bind(int fd, const struct addr *a)
{
	mode_t mask;
	int r;

	if (is_socket(a->u.un.sun_path)) {
		if (connect(fd, &a->u.sa, a->len) == 0 ||
		    errno != ECONNREFUSED) {
			errno = EADDRINUSE;	/* a program listens there */
			return -1;
		}
		unlink(a->u.un.sun_path);
	}
	mask = umask(0111);
	r = bind(fd, &a->u.sa, a->len);
	umask(mask);
	return r;
}

/* Set IP_TRANSPARENT, which TPROXY needs, to on (0 or 1) on an IP socket of
 * this address.  Returns 0, or -1 and errno: EPERM without CAP_NET_ADMIN. */
static int
set_transparent(int fd, const struct addr *a, int on)
{
	int v6 = a->u.sa.sa_family == AF_INET6, is = 0;
	int level = v6 ? IPPROTO_IPV6 : IPPROTO_IP;
	int option = v6 ? IPV6_IS_TRANSPARENT : IPV4_TRANSPARENT;
	socklen_t len = sizeof is;

	if (a->u.sa.sa_family == AF_UNIX)
		return 0;
	getsockopt(fd, level, option, &is, &len);
	if (is == on)
		return 0;
	return setsockopt(fd, level, option, &on, sizeof on);
}

/* Returns a listening socket, or -1 and errno.  v6only: refuse IPv4 clients. */
static int
socket_listen(const struct addr *a, int transparent, int v6only)
{
	int fd, err, one = 1, r;

	fd = socket(a->u.sa.sa_family,
	    SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd == -1)
		return -1;
	if (a->u.sa.sa_family == AF_UNIX)
		r = path_bind(fd, a);
	else {
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
		if (a->u.sa.sa_family == AF_INET6)
			setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &v6only,
			    sizeof v6only);
		if (transparent)	/* allows a foreign address in bind() */
			set_transparent(fd, a, 1);
		r = bind(fd, &a->u.sa, a->len);
	}
	if (r == 0 && listen(fd, BACKLOG) == 0)
		return fd;
	err = errno;
	if (r == 0 && a->u.sa.sa_family == AF_UNIX)
		unlink(a->u.un.sun_path);
	close(fd);
	errno = err;
	return -1;
}

/*
 * Store the listener with systemd for the next start (keep), or remove it from
 * the store.  It has the same name after a restart.
 */
static void
listener_store(struct listener *l, int keep)
{
	char state[NOTESZ], name[ADDRTEXT], *p;

	if (!has_store)
		return;
	ascii_clean(name, format(name, sizeof name, "%s", addr_full(&l->addr)),
	    "", '_');
	while ((p = strchr(name, ':')) != NULL)
		*p = '_';
	format(state, sizeof state, "%s=1\nFDNAME=" STORE_NAME "%s",
	    keep ? "FDSTORE" : "FDSTOREREMOVE", name);
	notify(state, keep ? l->fd : -1);
}

/* shutdown() frees the port: systemd or a child may hold a copy of the socket. */
static void
listener_shut(struct listener *l)
{
	listener_store(l, 0);
	shutdown(l->fd, SHUT_RDWR);
	close(l->fd);
	l->fd = -1;
}

/*
 * Close a listener.  ending: the daemon ends.  Listeners that systemd keeps a
 * copy of stay open then, and clients wait there for the next start.
 */
static void
listener_free(struct listener *l, int ending)
{
	if (l->foreign || (ending && has_store))
		close(l->fd);
	else if (l->fd != -1) {
		if (l->addr.u.sa.sa_family == AF_UNIX &&
		    unlink(l->addr.u.un.sun_path) == -1 && errno != ENOENT)
			logmsg(LOG_WARNING, "%s: cannot remove the socket:",
			    addr_full(&l->addr));
		listener_shut(l);
	}
	free(l);
}

/* Close all listeners (ending), or those that the new settings do not want. */
static void
listeners_close(int ending)
{
	struct listener *l, **p = &listeners;

	while ((l = *p) != NULL)
		if (ending || l->wanted == NONE) {
			*p = l->next;
			listener_free(l, ending);
		} else
			p = &l->next;
}

/* Fill in a listener that systemd has passed.  Returns 0, or -1 if its descriptor
 * is not a listening stream socket of a known family. */
static int
listener_inherit(struct listener *l)
{
	int is = 0, type = 0;
	socklen_t len = sizeof is, n = sizeof type;

	l->addr.len = sizeof l->addr.u;
	if (fcntl(l->fd, F_SETFL, O_NONBLOCK) == -1 ||
	    fcntl(l->fd, F_SETFD, FD_CLOEXEC) == -1 ||
	    getsockopt(l->fd, SOL_SOCKET, SO_ACCEPTCONN, &is, &len) == -1 ||
	    getsockopt(l->fd, SOL_SOCKET, SO_TYPE, &type, &n) == -1 ||
	    !is || type != SOCK_STREAM ||
	    getsockname(l->fd, &l->addr.u.sa, &l->addr.len) == -1)
		return -1;
	l->asked = l->addr;
	if (l->addr.u.sa.sa_family == AF_UNIX)
		return 0;
	addr_set_port(&l->asked, 0);
	len = sizeof l->v6only;
	if (l->addr.u.sa.sa_family == AF_INET6 &&
	    IN6_IS_ADDR_UNSPECIFIED(&l->addr.u.in6.sin6_addr))
		getsockopt(l->fd, IPPROTO_IPV6, IPV6_V6ONLY, &l->v6only, &len);
	return l->addr.u.sa.sa_family == AF_INET ||
	    l->addr.u.sa.sa_family == AF_INET6 ? 0 : -1;
}

/*
 * Take over the listeners that systemd passes: from its store those of the last
 * daemon, and those of a socket unit.
 */
static void
listeners_inherit(void)
{
	const char *name = getenv("LISTEN_FDNAMES");
	int fd, n = listen_fds();
	struct listener *l;

	for (fd = 3; fd < 3 + n; fd++) {
		if ((l = calloc(1, sizeof *l)) == NULL)
			die(1, "listeners from systemd:");
		l->fd = fd;
		l->foreign = name == NULL ||
		    strncmp(name, STORE_NAME, sizeof STORE_NAME - 1) != 0;
		if (name != NULL) {
			name += strcspn(name, ":");
			name += *name == ':';
		}
		if (listener_inherit(l) == -1) {
			logmsg(LOG_WARNING, "LISTEN_FDS: descriptor %d is not a "
			    "listening stream socket; it is closed", fd);
			close(fd);
			free(l);
			continue;
		}
		/* systemd removes a RuntimeDirectory= when the service stops. */
		if (l->addr.u.sa.sa_family == AF_UNIX &&
		    (l->addr.len <= offsetof(struct sockaddr_un, sun_path) ||
		    !is_socket(l->addr.u.un.sun_path))) {
			if (!l->foreign)
				listener_shut(l);
			listener_free(l, 0);
			continue;
		}
		l->use = SESSIONS;
		l->next = listeners;
		listeners = l;
	}
	unsetenv("LISTEN_PID");
	unsetenv("LISTEN_FDS");
	unsetenv("LISTEN_FDNAMES");
}

static enum use
use_of(const struct conf *c, const struct target *t)
{
	return t == c->status ? STATUS : SESSIONS;
}

/*
 * Give the target the addresses of its name.  Only the start looks names up,
 * since that blocks.  A reload must not block (promise 5): a name keeps the
 * addresses that it has in the settings in effect.
 */
static void
listen_resolve(struct target *t, int starting)
{
	struct target **old;

	if (t->name == NULL)
		return;
	if (starting) {
		t->naddr = addr_lookup(t->name, t->port, t->addr);
		return;
	}
	for (old = conf->listen; *old != NULL; old++)
		if (strcmp((*old)->text, t->text) == 0 &&
		    (*old)->port == t->port) {
			memcpy(t->addr, (*old)->addr, sizeof t->addr);
			t->naddr = (*old)->naddr;
		}
}

/* Returns 1 for [::] if a Listen line for IPv4 has the same port. */
static int
is_v6only(const struct conf *c, const struct addr *a)
{
	const struct target *t;
	int i, j;

	if (a->u.sa.sa_family != AF_INET6 ||
	    !IN6_IS_ADDR_UNSPECIFIED(&a->u.in6.sin6_addr))
		return 0;
	for (i = 0; i < c->nlisten; i++) {
		t = c->listen[i];
		for (j = 0; j < t->naddr; j++)
			if (t->addr[j].u.sa.sa_family == AF_INET &&
			    addr_port(&t->addr[j]) == addr_port(a))
				return 1;
	}
	return 0;
}

/* Returns the open listener for the address, or NULL. */
static struct listener *
listener_find(const struct conf *c, const struct addr *a)
{
	struct listener *l;

	for (l = listeners; l != NULL; l = l->next)
		if ((addr_equal(a, &l->asked) || addr_equal(a, &l->addr)) &&
		    l->v6only == is_v6only(c, a))
			return l;
	return NULL;
}

/*
 * Shut the listeners of ours that are not wanted any more and may overlap with
 * the address: 127.0.0.1:25 keeps 0.0.0.0:25 from being opened.  Paths never
 * overlap.  Returns how many were shut.
 */
static int
listeners_make_room(const struct addr *a)
{
	struct listener *l;
	int n = 0;

	for (l = listeners; l != NULL; l = l->next)
		if (l->wanted == NONE && l->fd != -1 && !l->foreign &&
		    a->u.sa.sa_family != AF_UNIX &&
		    l->addr.u.sa.sa_family != AF_UNIX &&
		    addr_port(&l->addr) == addr_port(a)) {
			listener_shut(l);
			n++;
		}
	return n;
}

/* Open a listener unless it is open.  Returns 0, or -1 with errno set. */
static int
listener_open(const struct conf *c, enum use use, const struct addr *a)
{
	struct listener *l = listener_find(c, a);
	int err;

	if (l != NULL) {
		errno = EADDRINUSE;
		return l->wanted == use ? 0 : -1;
	}
	if ((l = calloc(1, sizeof *l)) == NULL)
		return -1;
	l->wanted = use;
	l->asked = l->addr = *a;
	l->v6only = is_v6only(c, a);
	l->fd = socket_listen(a, c->transparent, l->v6only);
	if (l->fd == -1 && errno == EADDRINUSE && listeners_make_room(a) > 0)
		l->fd = socket_listen(a, c->transparent, l->v6only);
	if (l->fd == -1) {
		err = errno;
		free(l);
		errno = err;
		return -1;
	}
	l->next = listeners;
	listeners = l;
	if (a->u.sa.sa_family != AF_UNIX)	/* port 0: the kernel's choice */
		getsockname(l->fd, &l->addr.u.sa, &l->addr.len);
	listener_store(l, 1);
	return 0;
}

/* Open the listeners of one line.  Returns 0 if at least one of its addresses
 * works, else -1, which has been logged. */
static int
listen_on(const struct conf *c, const struct target *t, int starting)
{
	const char *setting = t == c->status ? "StatusListen" : "Listen";
	int i, opened = 0;

	if (t->naddr == 0)
		logmsg(LOG_ERR, "%s: %s: %s", setting, t->text, starting ?
		    "no address found for this name" :
		    "names are resolved at start only; use an address");
	for (i = 0; i < t->naddr; i++)
		if (listener_open(c, use_of(c, t), &t->addr[i]) == 0)
			opened++;
		else
			logmsg(t->naddr > 1 ? LOG_WARNING : LOG_ERR,
			    starting || errno != EACCES ? "%s: %s:" : "%s: %s: "
			    "only a restart can open it, since root privileges "
			    "are dropped, and the sandbox allows only "
			    "directories of the old settings:",
			    setting, addr_full(&t->addr[i]));
	if (opened == 0 && t->naddr > 1)
		logmsg(LOG_ERR, "%s: %s: none of its addresses can be used",
		    setting, t->text);
	return opened > 0 ? 0 : -1;
}

/* After a failed reload, close the new listeners, and open those again that were
 * shut to make room. */
static void
listeners_restore(void)
{
	struct listener *l;

	for (l = listeners; l != NULL; l = l->next)
		l->wanted = l->use;
	listeners_close(0);
	for (l = listeners; l != NULL; l = l->next) {
		if (l->fd != -1)
			continue;
		l->fd = socket_listen(&l->addr, conf->transparent, l->v6only);
		if (l->fd == -1) {
			logmsg(LOG_ERR, "%s: cannot reopen the listener:",
			    addr_full(&l->addr));
			l->wanted = NONE;
		} else
			listener_store(l, 1);
	}
	listeners_close(0);
}

/* Open the listeners that are new in c, and close those that are not in it.
 * Returns 0, or -1 if that failed, and then all listeners are as before. */
static int
listeners_open(const struct conf *c, int starting)
{
	struct target *const *t;
	struct listener *l;
	int i, warned = 0;

	for (l = listeners; l != NULL; l = l->next)
		l->wanted = NONE;
	for (t = c->listen; *t != NULL; t++)
		listen_resolve(*t, starting);
	for (t = c->listen; *t != NULL; t++)
		for (i = 0; i < (*t)->naddr; i++)
			if ((l = listener_find(c, &(*t)->addr[i])) != NULL &&
			    l->wanted == NONE)
				l->wanted = use_of(c, *t);
	for (t = c->listen; *t != NULL; t++)
		if (listen_on(c, *t, starting) == -1) {
			listeners_restore();
			return -1;
		}
	for (l = listeners; starting && l != NULL; l = l->next)
		if (l->wanted == NONE)
			logmsg(LOG_NOTICE, "%s: systemd passed this listener, "
			    "but no Listen line asks for it; it is closed",
			    addr_full(&l->addr));
	listeners_close(0);
	for (l = listeners; l != NULL; l = l->next) {
		l->use = l->wanted;
		/* An old listener, or socket_listen() could not set it. */
		if (set_transparent(l->fd, &l->addr, c->transparent) == -1 &&
		    !warned++)
			logmsg(LOG_WARNING, "TransparentProxy: %s: TPROXY "
			    "connections are not accepted (REDIRECT ones are): "
			    "IP_TRANSPARENT:", addr_full(&l->addr));
	}
	return 0;
}

static int
is_loopback(const struct addr *a)
{
	const char *text = addr_text(a);

	return a->u.sa.sa_family == AF_UNIX || strcmp(text, "::1") == 0 ||
	    strncmp(text, "127.", 4) == 0;
}

static void
listeners_log(const struct conf *c)
{
	struct listener *l;

	for (l = listeners; l != NULL; l = l->next) {
		if (l->use == STATUS) {
			logmsg(LOG_INFO, "status on %s", addr_full(&l->addr));
			continue;
		}
		logmsg(LOG_INFO, "listening on %s", addr_full(&l->addr));
		if (!is_loopback(&l->addr) && !c->transparent &&
		    c->out->naddr == 0 && c->out->name == NULL)
			logmsg(LOG_WARNING, "%s can be reached from other hosts, "
			    "and OutAddress has no host: each client gets a "
			    "connection back to itself",
			    addr_full(&l->addr));
	}
}

/*
 * Signals: each is a byte in a pipe, which the loop reads.
 */

static int reload_wanted;

static void log_counters(void);
static int set_limits(const struct conf *);

static void
on_signal(int sig)
{
	int err = errno;
	char c = sig;

	(void)!write(sigpipe[1], &c, 1);	/* full: many signals wait */
	errno = err;
}

static void
signals_open(void)
{
	static const int caught[] = { SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1 };
	struct sigaction sa;
	size_t i;

	if (pipe2(sigpipe, O_CLOEXEC | O_NONBLOCK) == -1)
		die(1, "pipe:");
	memset(&sa, 0, sizeof sa);
	sa.sa_flags = SA_RESTART;
	sa.sa_handler = on_signal;
	for (i = 0; i < sizeof caught / sizeof caught[0]; i++)
		sigaction(caught[i], &sa, NULL);
	sa.sa_handler = SIG_IGN;
	sigaction(SIGPIPE, &sa, NULL);
	sigaction(SIGXFSZ, &sa, NULL);	/* write() fails with EFBIG */
}

static int
differ(const char *a, const char *b)
{
	return a == NULL || b == NULL ? a != b : strcmp(a, b) != 0;
}

/* Returns 1 and logs it if a setting differs that a reload cannot change. */
static int
needs_restart(const struct conf *c)
{
	const char *name =
	    differ(c->user, conf->user) ? "User" :
	    differ(c->pidfile, conf->pidfile) ? "PidFile" :
	    sandboxed && differ(c->tempdir, conf->tempdir) ? "TempDirectory" :
	    sandboxed && c->virusaction != NULL ? "VirusAction" : NULL;

	if (name != NULL)
		logmsg(LOG_ERR, "%s: %s cannot be changed without a restart",
		    conf->path, name);
	return name != NULL;
}

/* Returns 0 if a file can be made in TempDirectory, else -1, which has been
 * logged.  Landlock forbids it in a directory that was made after the start. */
static int
try_tempdir(const struct conf *c)
{
	int fd = spool_file(c->tempdir, 0);

	if (fd == -1)
		logmsg(LOG_ERR, "TempDirectory: %s is not writable by user "
		    "%s; %s:", c->tempdir, user_name(),
		    sandboxed && errno == EACCES ? "if it was re-created after "
		    "the start, restart clamsmtpd (the sandbox allows only the "
		    "old one)" : "it must exist and belong to that "
		    "user (in a container, mount a tmpfs there)");
	else
		close(fd);
	return fd == -1 ? -1 : 0;
}

/* Begin to use the settings.  Names are looked up now, so that the first
 * message need not wait. */
static void
settings_begin(void)
{
	int i;

	listeners_log(conf);
	if (conf->out != NULL && !conf->transparent)
		target_resolve(conf->out, 0);
	for (i = 0; i < conf->nclamd; i++)
		target_resolve(conf->clamd[i]->target, 0);
	clamd_ping(conf, 1);
}

static void
reload(void)
{
	struct conf *c = conf_load(conf->path, flags, nflags, given['p']);

	if (c == NULL || needs_restart(c) || try_tempdir(c) == -1 ||
	    set_limits(c) == -1 || listeners_open(c, 0) == -1) {
		logmsg(LOG_ERR, "%s: reload failed, keeping the old settings",
		    conf->path);
		conf_put(c);
		return;
	}
	conf_put(conf);
	conf = c;
	log_format(conf->json);
	logmsg(LOG_NOTICE, "%s: reloaded", conf->path);
	settings_begin();
}

static void
on_signals(void *arg, int revents)
{
	char sig;

	(void)arg;
	(void)revents;
	while (read(sigpipe[0], &sig, 1) == 1)
		switch (sig) {
		case SIGCHLD:
			children_reap();
			break;
		case SIGHUP:
			reload_wanted = 1;
			break;
		case SIGUSR1:
			log_counters();
			break;
		default:
			logmsg(LOG_NOTICE, stopping ? "stopping at once" :
			    "stopping when the messages under way are done");
			if (!stopping) {
				notify("STOPPING=1", -1);
				/* Postfix defers a mail that gets 421 before
				 * MAIL.  The store lets new clients wait. */
				if (has_store)
					begin_until = now + BEGIN_TIME;
			}
			stopping++;
			drain_until = now + DRAIN_TIME;
		}
}

/* Act on signals at the end of a pass: a listener that is about to be served
 * must not be closed. */
static void
handle_signals(void)
{
	if (stopping) {
		listeners_close(1);
		sessions_shutdown(now < begin_until ? BEGIN_TIME : 0,
		    now >= drain_until);
	} else if (reload_wanted)
		reload();
	reload_wanted = 0;
}

/*
 * systemd's interface to services, without its library: sd_notify(3),
 * sd_pid_notify_with_fds(3), sd_listen_fds(3), sd_watchdog_enabled(3).
 */

static int notify_fd = -1;		/* connected to NOTIFY_SOCKET; -1: none */
static int notify_ready;		/* READY=1 was sent */
static int64_t watchdog_time;		/* ms from WATCHDOG=1 to the next; 0: none */
static int64_t watchdog_at;

/* Returns the value of a variable that is a number above 0, else 0. */
static int64_t
env_number(const char *name)
{
	const char *v = getenv(name);
	int64_t n;

	return v != NULL && parse_number(v, "", &n) == 1 ? n : 0;
}

/* Called as root: only root may use the socket of OpenRC's start-stop-daemon. */
static void
notify_open(void)
{
	const char *path = getenv("NOTIFY_SOCKET");
	struct timeval limit = { NOTIFY_TIME / SECOND, 0 };
	struct addr a;

	if (path == NULL || addr_path(&a, path) == -1)
		return;
	if (*path == '@') {		/* abstract: no NUL at the end */
		a.u.un.sun_path[0] = '\0';
		a.len--;
	}
	notify_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	setsockopt(notify_fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	if (notify_fd == -1 || connect(notify_fd, &a.u.sa, a.len) == -1) {
		logmsg(LOG_WARNING, "NOTIFY_SOCKET: %s:", path);
		close(notify_fd);
		notify_fd = -1;
		return;
	}
	has_store = env_number("FDSTORE") > 0;
	if (getenv("WATCHDOG_PID") == NULL ||
	    env_number("WATCHDOG_PID") == getpid())
		watchdog_time = env_number("WATCHDOG_USEC") / 1000 / 2;
}

/* Send the state to systemd, with a descriptor unless that is -1. */
static void
notify(const char *state, int fd)
{
	union {
		struct cmsghdr head;
		char	 space[CMSG_SPACE(sizeof fd)];
	} control = { .head = { .cmsg_len = CMSG_LEN(sizeof fd),
	    .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
	struct iovec iov = { (void *)(uintptr_t)state, strlen(state) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd != -1) {
		m.msg_control = &control;
		m.msg_controllen = sizeof control;
		memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
	}
	if (notify_fd == -1 || sendmsg(notify_fd, &m, MSG_NOSIGNAL |
	    (notify_ready ? MSG_DONTWAIT : 0)) != -1)
		return;
	if (!notify_ready || errno != ECONNREFUSED)
		logmsg(LOG_WARNING, "NOTIFY_SOCKET: %.*s:",
		    (int)strcspn(state, "\n"), state);
	else {			/* OpenRC reads READY=1 only */
		close(notify_fd);
		notify_fd = -1;
		watchdog_time = 0;
	}
}

static void
watchdog_poll(void)
{
	if (watchdog_time == 0)
		return;
	if (now >= watchdog_at) {
		notify("WATCHDOG=1", -1);
		watchdog_at = now + watchdog_time;
	}
	poll_deadline(watchdog_at);
}

/* Returns how many listeners were passed to this process: descriptors from 3. */
static int
listen_fds(void)
{
	int64_t n = env_number("LISTEN_FDS");

	return env_number("LISTEN_PID") == getpid() && n < 1000 ? n : 0;
}

/*
 * The status page: HTTP/1.0, one request per connection.
 */

static struct http_client {
	struct peer peer;
	unsigned long long number;	/* the oldest has the lowest */
	int64_t	 deadline;		/* 0: no client */
	int	 awaits_ping;		/* /healthz: clamd has not answered yet */
	int	 head;			/* HEAD: the reply has no body */
	int	 answered;		/* the reply is in peer.out */
} http_clients[MAXHTTP];
#define HTTP_END	(http_clients + MAXHTTP)

static void on_http(void *, int);

static void
http_close(struct http_client *v)
{
	peer_close(&v->peer);
	memset(v, 0, sizeof *v);
}

/* Promise 6: at the limit, the oldest client goes that does not wait for clamd. */
static void
http_accept(int fd)
{
	static unsigned long long accepted;
	struct http_client *v, *place = NULL;
	struct pollfd p = { 0 };

	for (v = http_clients; v < HTTP_END; v++) {
		p.fd = v->peer.fd;
		if (v->deadline != 0 && poll(&p, 1, 0) == 1)
			http_close(v);		/* reset or closed by it */
		if (!v->awaits_ping &&
		    (place == NULL || v->number < place->number))
			place = v;
	}
	if (place == NULL) {
		close(fd);
		return;
	}
	if (place->deadline != 0)
		http_close(place);
	place->peer.fd = fd;
	place->number = ++accepted;
	place->deadline = now + HTTP_TIME;
	on_http(place, POLLIN);		/* most requests are here already */
}

/* Add to the reply; output beyond one buffer is dropped.  Promise 8: only ASCII
 * is sent. */
static void __attribute__((format(printf, 2, 3)))
http_print(struct http_client *v, const char *fmt, ...)
{
	char line[NOTESZ];
	va_list ap;
	size_t n;

	if (v->answered && v->head)
		return;
	va_start(ap, fmt);
	n = vformat(line, sizeof line, fmt, ap);
	va_end(ap);
	ascii_clean(line, n, " \r\n", '?');
	if (buf_ready(&v->peer.out, n))
		buf_put(&v->peer.out, line, n);
}

static void
http_head(struct http_client *v, const char *status)
{
	http_print(v, "HTTP/1.0 %s\r\nContent-Type: text/plain; version=0.0.4; "
	    "charset=utf-8\r\nConnection: close\r\n\r\n", status);
	v->answered = 1;
}

/* For SIGUSR1. */
static void
log_counters(void)
{
	char line[NOTESZ];
	size_t n;
	int i;

	n = format(line, sizeof line, "sessions=%llu of %llu refused=%llu "
	    "messages=%llu bytes=%llu", count.open, count.sessions,
	    count.refused, count.all_messages, count.bytes);
	for (i = 0; i < NOUTCOMES; i++)
		n += format(line + n, sizeof line - n, " %s=%llu",
		    outcome_names[i], count.messages[i]);
	logmsg(LOG_NOTICE, "%s", line);
}

static void
http_page(struct http_client *v)
{
	const struct clamd *c;
	int i;

	http_head(v, "200 OK");
	http_print(v, "clamsmtpd " VERSION ", up since %s\n",
	    rfc3339_date(count.started));
	http_print(v, "sessions: %llu now, %llu at most so far, %d allowed; "
	    "%llu in all, %llu refused\n", count.open, count.most_open,
	    (int)conf->maxconn, count.sessions, count.refused);
	http_print(v, "messages: %llu", count.all_messages);
	for (i = 0; i < NOUTCOMES; i++)
		http_print(v, ", %llu %s", count.messages[i], outcome_names[i]);
	for (i = 0; i < conf->nclamd; i++) {
		c = conf->clamd[i];
		http_print(v, "\nclamd %s: %s", target_text(c->target),
		    c->complaint[0] != '\0' ? c->complaint :
		    "well, as far as is known");
		if (c->signatures > 0)
			http_print(v, ", signatures %lld",
			    (long long)c->signatures);
		if (c->signatures_at > 0)
			http_print(v, " of %s", rfc3339_date(c->signatures_at));
	}
	http_print(v, "\nscans: %llu running, %llu waiting\n",
	    count.scans_running, count.scans_waiting);
}

/* The metrics of one value each, in count.  Pointers would need relocations. */
static const struct metric {
	char	 name[24], help[24];
	size_t	 at;
} metrics[] = {
#define AT(member)	offsetof(struct counters, member)
	{ "start_time_seconds", "Since 1970.", AT(started) },
	{ "sessions", "Open now.", AT(open) },
	{ "sessions_total", "Accepted.", AT(sessions) },
	{ "sessions_refused_total", "Above MaxConnections.", AT(refused) },
	{ "message_bytes_total", "Of all messages.", AT(bytes) },
	{ "scans_running", "At clamd now.", AT(scans_running) },
	{ "scans_waiting", "For MaxScans.", AT(scans_waiting) },
	{ "log_lines_lost_total", "Too many waited.", AT(log_lost) },
};

static void
metric_head(struct http_client *v, const char *name, const char *help)
{
	const char *last = strrchr(name, '_');

	http_print(v, "# HELP clamsmtpd_%s %s\n# TYPE clamsmtpd_%s %s\n", name,
	    help, name, strcmp(name, "scan_seconds") == 0 ? "histogram" :
	    last != NULL && strcmp(last, "_total") == 0 ? "counter" : "gauge");
}

/* Returns text as a label's value; text of the configuration file has no control
 * characters. */
static const char *
label(const char *text)
{
	static char value[NOTESZ / 2];
	char *w = value;

	for (; *text != '\0' && w < value + sizeof value - 3; text++) {
		if (*text == '"' || *text == '\\')
			*w++ = '\\';
		*w++ = *text;
	}
	*w = '\0';
	return value;
}

static void
http_scans(struct http_client *v)
{
	unsigned long long n = 0;
	int i, ms;

	metric_head(v, "scan_seconds", "From the final dot to the verdict.");
	for (i = 0; i < NBUCKETS - 1; i++) {
		ms = scan_limits[i];
		n += count.scans[i];
		http_print(v, "clamsmtpd_scan_seconds_bucket{le=\"%d.%02d\"} "
		    "%llu\n", ms / 1000, ms % 1000 / 10, n);
	}
	n += count.scans[i];
	http_print(v, "clamsmtpd_scan_seconds_bucket{le=\"+Inf\"} %llu\n"
	    "clamsmtpd_scan_seconds_sum %llu.%03d\n"
	    "clamsmtpd_scan_seconds_count %llu\n", n, count.scan_ms / 1000,
	    (int)(count.scan_ms % 1000), n);
}

static void
http_clamds(struct http_client *v)
{
	static const struct { char name[36], help[36]; } m[] = {
		{ "clamd_up", "0: no answer since a scan failed." },
		{ "clamd_failures_total", "Scans without a verdict." },
		{ "clamd_signatures", "Their version." },
		{ "clamd_signatures_timestamp_seconds", "As if in UTC." },
	};
	int i, j;

	for (j = 0; j < 4; j++) {
		metric_head(v, m[j].name, m[j].help);
		for (i = 0; i < conf->nclamd; i++) {
			const struct clamd *c = conf->clamd[i];
			const long long n[] = { c->complaint[0] == '\0',
			    c->failures, c->signatures, c->signatures_at };

			if (n[j] > 0 || j < 2)	/* else it is not known */
				http_print(v, "clamsmtpd_%s{address=\"%s\"} "
				    "%lld\n", m[j].name,
				    label(target_text(c->target)), n[j]);
		}
	}
}

static void
http_metrics(struct http_client *v)
{
	const struct metric *m, *end = metrics + sizeof metrics / sizeof *m;
	int i;

	http_head(v, "200 OK");
	metric_head(v, "build_info", "Its version.");
	http_print(v, "clamsmtpd_build_info{version=\"" VERSION "\"} 1\n");
	for (m = metrics; m < end; m++) {
		metric_head(v, m->name, m->help);
		http_print(v, "clamsmtpd_%s %llu\n", m->name,
		    *(const unsigned long long *)((const char *)&count + m->at));
	}
	metric_head(v, "messages_total", "By what became of them.");
	for (i = 0; i < NOUTCOMES; i++)
		http_print(v, "clamsmtpd_messages_total{verdict=\"%s\"} %llu\n",
		    outcome_names[i], count.messages[i]);
	http_clamds(v);
	http_scans(v);
	clamd_ping(conf, 0);	/* for the next request */
}

/* Begin a health check, or reply if the one that is under way has a result. */
static void
http_health(struct http_client *v)
{
	const char *why = clamd_ping(conf, 0);

	v->awaits_ping = why == NULL;
	if (why == NULL)
		return;
	http_head(v, *why == '\0' ? "200 OK" : "503 Service Unavailable");
	http_print(v, "%s\n", *why == '\0' ? "ok" : why);
}

/* Reply to a request, of which only the first line matters. */
static void
http_reply(struct http_client *v, const char *line)
{
	size_t n;

	v->head = strncmp(line, "HEAD ", 5) == 0;
	if (!v->head && strncmp(line, "GET ", 4) != 0) {
		http_head(v, "405 Method Not Allowed");
		return;
	}
	line += v->head ? 5 : 4;
	n = strcspn(line, " ?\r\n");
	if (mem_equal(line, n, "/"))
		http_page(v);
	else if (mem_equal(line, n, "/metrics"))
		http_metrics(v);
	else if (mem_equal(line, n, "/healthz"))
		http_health(v);
	else
		http_head(v, "404 Not Found");
}

/* Returns the start of the body, after the empty line, or NULL if the head has no
 * end yet. */
static const char *
http_body(const char *p)
{
	while ((p = strchr(p, '\n')) != NULL) {
		p++;
		p += *p == '\r';
		if (*p == '\n')
			return p + 1;
	}
	return NULL;
}

static void
on_http(void *arg, int revents)
{
	struct http_client *v = arg;
	struct buf *in = &v->peer.in;
	char request[REQUESTSZ];

	if (revents & POLLIN)
		peer_fill(&v->peer, 0);
	if (!v->answered && !v->awaits_ping) {
		format(request, sizeof request, "%.*s", (int)buf_len(in),
		    buf_head(in));
		if (http_body(request) != NULL)
			http_reply(v, request);
		else if (buf_len(in) >= sizeof request)
			http_head(v, "400 Bad Request");
	}
	if (v->answered)
		buf_free(in);
	if (v->answered && peer_drain(&v->peer, 0))
		shutdown(v->peer.fd, SHUT_WR);
	peer_settle(&v->peer);
}

static void
http_poll(void)
{
	struct http_client *v;
	struct buf *out;

	for (v = http_clients; v < HTTP_END; v++) {
		if (v->deadline == 0)
			continue;
		if (v->awaits_ping)
			http_health(v);
		out = &v->peer.out;
		if (now >= v->deadline || v->peer.err ||
		    (v->peer.eof && !v->awaits_ping && buf_len(out) == 0)) {
			http_close(v);
			continue;
		}
		if (!v->awaits_ping)
			poll_add(v->peer.fd, buf_len(out) > 0 ? POLLOUT : POLLIN,
			    on_http, v);
		poll_deadline(v->deadline);
	}
}

/*
 * -C: ask the running daemon for its health.
 */

/* Returns the length of the whole reply, or -1 and sets errno. */
static ssize_t
health_ask(const struct addr *a, char *reply, size_t size)
{
	static const char request[] = "GET /healthz HTTP/1.0\r\n\r\n";
	struct timeval limit = { HTTP_TIME / SECOND, 0 };
	int err, fd = socket(a->u.sa.sa_family, SOCK_STREAM, 0);
	ssize_t n = -1, more;
	char c;

	if (fd == -1)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	if (connect(fd, &a->u.sa, a->len) == 0 &&
	    send(fd, request, sizeof request - 1, MSG_NOSIGNAL) != -1)
		n = recv(fd, reply, size, MSG_WAITALL);
	/* The limit, too, ends a recv(); the reply ends at EOF. */
	if (n != -1 && (more = recv(fd, &c, 1, MSG_DONTWAIT)) != 0) {
		if (more == 1)
			errno = EMSGSIZE;
		n = -1;
	}
	err = errno == EAGAIN || errno == EINPROGRESS ? ETIMEDOUT : errno;
	close(fd);
	errno = err;
	return n;
}

/* Returns the exit status. */
static int
check_health(const struct conf *c)
{
	struct target *t = c->status;
	char answer[2 * NOTESZ];
	const char *why;
	ssize_t n = -1;
	int i;

	if (t == NULL) {
		logmsg(LOG_ERR, "StatusListen is not set, but -C needs it");
		return 2;
	}
	listen_resolve(t, 1);
	if (t->naddr == 0) {
		logmsg(LOG_ERR, "StatusListen: %s: no address found for this "
		    "name", t->text);
		return 1;
	}
	for (i = 0; i < t->naddr && n == -1; i++)
		n = health_ask(&t->addr[i], answer, sizeof answer - 1);
	if (n == -1) {
		logmsg(LOG_ERR, "StatusListen: %s:", t->text);
		return 1;
	}
	answer[n] = '\0';
	if ((why = http_body(answer)) == NULL)
		why = "invalid answer from StatusListen";
	else if (strncmp(answer, "HTTP/1.0 200", 12) == 0)
		return 0;
	logmsg(LOG_ERR, "%s", printable(why, strcspn(why, "\n")));
	return 1;
}

/*
 * Limits, the pid file, privileges and the sandbox.
 */

/* Raise the limit of descriptors to what the settings need.  Returns 0, or -1 if
 * that is not allowed, which has been logged. */
static int
set_limits(const struct conf *c)
{
	struct rlimit r = { 1, 1 };
	/* Client, next hop and spool of each session; connections to clamd. */
	rlim_t want = 3 * c->maxconn + c->maxscans * c->nclamd + 64;

	if (c->quarantine)
		want += MAXCOPIES;	/* their answers come through pipes */

	/* No core dumps, for they contain mail.  A limit of 0 does not stop the
	 * pipe to a crash handler, and 1 does (core(5)). */
	setrlimit(RLIMIT_CORE, &r);
	if (getrlimit(RLIMIT_NOFILE, &r) == -1 || r.rlim_cur >= want)
		return 0;
	r.rlim_cur = want;
	if (r.rlim_max < want)
		r.rlim_max = want;
	if (setrlimit(RLIMIT_NOFILE, &r) == 0)
		return 0;
	getrlimit(RLIMIT_NOFILE, &r);
	logmsg(LOG_ERR, "MaxConnections: %d needs %lu descriptors, and the limit "
	    "is %lu: %s or lower MaxConnections", (int)c->maxconn,
	    (unsigned long)want, (unsigned long)r.rlim_max,
	    c == conf ? "raise it (ulimit -n)" : "restart clamsmtpd");
	return -1;
}

static void
pid_file_create(const char *path)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	struct stat mine, there;
	char text[32];
	int fd, n = format(text, sizeof text, "%ld\n", (long)getpid());

	for (;;) {
		fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
		if (fd == -1)
			die(1, "PidFile: %s:", path);
		if (fcntl(fd, F_SETLK, &lock) == -1) {
			if (errno != EACCES && errno != EAGAIN)
				die(1, "PidFile: %s: lock:", path);
			fcntl(fd, F_GETLK, &lock);
			die(1, "PidFile: %s: clamsmtpd is already running "
			    "with process id %ld", path, (long)lock.l_pid);
		}
		/* A daemon that ended may have removed the file meanwhile. */
		if (fstat(fd, &mine) == 0 && lstat(path, &there) == 0 &&
		    mine.st_dev == there.st_dev && mine.st_ino == there.st_ino)
			break;
		close(fd);
	}
	pid_fd = fd;			/* exit() removes the file from now on */
	if (ftruncate(pid_fd, 0) == -1 || pwrite(pid_fd, text, n, 0) != n)
		die(1, "PidFile: %s: write:", path);
}

static void
pid_file_remove(void)
{
	const char *path = conf->pidfile;

	if (pid_fd == -1)
		return;
	/* The directory may belong to root, and root's rights are dropped. */
	if (unlink(path) == -1 && ftruncate(pid_fd, 0) == -1)
		logmsg(LOG_WARNING, "PidFile: %s: remove:", path);
	close(pid_fd);
}

/* Look up a user by name or number.  A number needs no passwd entry: pw_name is
 * NULL then.  Returns NULL if there is no such user. */
static struct passwd *
find_user(const char *user)
{
	static struct passwd nameless;
	struct passwd *pw;
	int64_t n;

	if (parse_number(user, "", &n) == -1)
		return getpwnam(user);
	if (n >= (uid_t)-1)
		return NULL;
	if ((pw = getpwuid(n)) != NULL)
		return pw;
	nameless.pw_uid = nameless.pw_gid = n;
	return &nameless;
}

static const char no_such_user[] = "User: \"%s\" is not a user of this system";

static void
drop_privileges(const char *user)
{
	struct passwd *pw = find_user(user);
	uid_t uid;
	gid_t gid;

	if (pw == NULL)
		die(1, no_such_user, user);
	uid = pw->pw_uid;
	gid = pw->pw_gid;
	if (getuid() == uid && geteuid() == uid && uid != 0)
		return;
	if ((pw->pw_name != NULL ? initgroups(pw->pw_name, gid) :
	    setgroups(1, &gid)) == -1)
		die(1, "User: %s: groups:", user);
	if (setgid(gid) == -1 || setuid(uid) == -1)
		die(1, "User: %s:", user);
	if (uid != 0 && (setuid(0) != -1 || geteuid() != uid || getegid() != gid))
		die(1, "User: %s: cannot drop root privileges", user);
}

/*
 * Drop the capabilities that a unit gave us for ports below 1024 and for TPROXY.
 * Root keeps its rights unless User is set.  The numbers are the kernel's, as
 * below.
 */
static void
drop_capabilities(void)
{
	struct { uint32_t version; int32_t pid; } head = { 0x20080522, 0 };
	struct { uint32_t effective, permitted, inheritable; } caps[2];

	if (geteuid() == 0)
		return;
	if (syscall(SYS_capget, &head, caps) == 0 && caps[0].permitted == 0 &&
	    caps[1].permitted == 0)
		return;
	memset(caps, 0, sizeof caps);
	if (syscall(SYS_capset, &head, caps) == -1)
		logmsg(LOG_WARNING, "cannot drop capabilities:");
}

/*
 * Landlock (Linux 5.13).  The numbers are the kernel's, since not every system
 * has its headers.
 */
#define LL_WRITE_FILE	(1 << 1)
#define LL_REMOVE_FILE	(1 << 5)
#define LL_MAKE_REG	(1 << 8)
#define LL_MAKE_SOCK	(1 << 9)
#define LL_TRUNCATE	(1 << 14)	/* since version 3 */
#define LL_ALL_WRITES	(0x1ff2)	/* those, and all other makes and removes */

#ifndef SYS_landlock_create_ruleset	/* old headers */
#define SYS_landlock_create_ruleset	-1
#define SYS_landlock_add_rule		-1
#define SYS_landlock_restrict_self	-1
#endif

static int
landlock_allow(int ruleset, uint64_t access, const char *path, int is_dir)
{
	struct { uint64_t access; int32_t fd; } __attribute__((packed)) rule;
	char dir[PATH_MAX];
	int r;

	format(dir, sizeof dir, "%s", path);
	if (!is_dir)
		strrchr(dir, '/')[1] = '\0';
	rule.access = access & (LL_WRITE_FILE | LL_REMOVE_FILE | LL_MAKE_REG |
	    LL_TRUNCATE | (is_dir ? 0 : LL_MAKE_SOCK));
	rule.fd = open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (rule.fd == -1)
		return -1;
	r = syscall(SYS_landlock_add_rule, ruleset, 1, &rule, 0);
	close(rule.fd);
	return r;
}

static int
landlock(const struct conf *c)
{
	uint64_t access = LL_ALL_WRITES;
	struct target *const *t;
	int version, set, r;

	/* On 32-bit ARM, system call -1 ends the program with SIGILL. */
	if (SYS_landlock_create_ruleset == -1)
		return -1;
	version = syscall(SYS_landlock_create_ruleset, NULL, 0, 1);
	if (version < 1)
		return -1;
	if (version >= 3)
		access |= LL_TRUNCATE;
	set = syscall(SYS_landlock_create_ruleset, &access, sizeof access, 0);
	if (set == -1)
		return -1;
	r = landlock_allow(set, access, c->tempdir, 1);
	if (c->pidfile != NULL)
		r |= landlock_allow(set, access, c->pidfile, 0);
	for (t = c->listen; *t != NULL; t++)
		if ((*t)->text[0] == '/')
			r |= landlock_allow(set, access, (*t)->text, 0);
	if (r == 0)
		r = syscall(SYS_landlock_restrict_self, set, 0);
	close(set);
	return r;
}

/* There is no sandbox with a VirusAction, whose script may run setgid programs. */
static void
sandbox(const struct conf *c)
{
	if (c->virusaction != NULL) {
		logmsg(LOG_INFO, "sandbox: none because of VirusAction");
		return;
	}
	sandboxed = 1;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == -1)
		logmsg(LOG_INFO, "sandbox: none on this kernel");
	else if (landlock(c) == 0)
		logmsg(LOG_INFO, "sandbox: no new privileges; files are written "
		    "only in %s and next to PidFile and unix listeners",
		    c->tempdir);
	else
		logmsg(LOG_INFO, "sandbox: no new privileges (kernel without "
		    "Landlock)");
}

/*
 * Options.
 */

static void __attribute__((noreturn))
usage(void)
{
	static const char text[] =
	    "usage: clamsmtpd [-CFn] [-d level] [-f configfile] [-p pidfile]\n"
	    "       clamsmtpd -v\n";

	exit(write(2, text, sizeof text - 1) == -1 ? 1 : 2);
}

static void
old_flag(const char *setting, const char *value)
{
	if (nflags == sizeof flags / sizeof flags[0])
		usage();
	flags[nflags][0] = setting;
	flags[nflags++][1] = value;
}

/* The flags of the original that are settings now; "": the value is the
 * argument.  Pointers would need relocations. */
static const struct { char flag, setting[15], value[7]; } old_flags[] = {
	{ 'b', "Action", "bounce" }, { 'c', "ClamAddress", "" },
	{ 'D', "TempDirectory", "" }, { 'h', "Header", "" },
	{ 'l', "Listen", "" }, { 'm', "MaxConnections", "" },
	{ 'q', "Quarantine", "on" }, { 't', "TimeOut", "" },
	{ 'X', "DebugFiles", "on" },
};
#define NOLD	(sizeof old_flags / sizeof old_flags[0])

/* arg: NULL if the flag takes none. */
static void
option(char flag, const char *arg)
{
	static const char version[] = "clamsmtpd " VERSION "\n"
	    "configuration file: " CONFFILE "\n";
	size_t i;

	for (i = 0; i < NOLD; i++)
		if (old_flags[i].flag == flag) {
			old_flag(old_flags[i].setting,
			    arg != NULL ? arg : old_flags[i].value);
			return;
		}
	if (flag == 'v')
		exit(write(1, version, sizeof version - 1) == -1);
	if (strchr("CFndfp", flag) == NULL) {
		logmsg(LOG_ERR, "-%c: no such option", flag);
		usage();
	}
	given[(int)flag] = arg != NULL ? arg : "";
}

static void
options_read(char **argv)
{
	const char *p, *arg, *level;

	while (*++argv != NULL && (*argv)[0] == '-' && (*argv)[1] != '\0') {
		if (strcmp(*argv, "--") == 0) {
			argv++;
			break;
		}
		arg = NULL;
		for (p = *argv + 1; *p != '\0' && arg == NULL; p++) {
			if (strchr("dfpcDhlmt", *p) != NULL &&
			    (arg = p[1] != '\0' ? p + 1 : *++argv) == NULL) {
				logmsg(LOG_ERR, "-%c: its argument is missing",
				    *p);
				usage();
			}
			option(*p, arg);
		}
	}
	if (*argv != NULL && argv[1] != NULL)
		usage();
	if (*argv != NULL)
		old_flag("OutAddress", *argv);
	level = given['d'];
	if (level != NULL && (strspn(level, "01234") != 1 || level[1] != '\0')) {
		logmsg(LOG_ERR, "-d: \"%s\" is not a level from 0 to 4", level);
		usage();
	}
}

static void
flags_warn(const char *file)
{
	int i;

	for (i = 0; i < nflags; i++)
		logmsg(LOG_WARNING, "command line: the option for %s is "
		    "deprecated; put \"%s: %s\" into %s", flags[i][0], flags[i][0],
		    flags[i][1], file);
}

/*
 * Start and end.
 */

/* Promise 7: called by exit(), before the loop as well. */
static void
remove_files(void)
{
	listeners_close(1);
	pid_file_remove();
	conf_put(conf);
	conf = NULL;
}

/*
 * Go on in a child.  Returns a descriptor, to which the child writes a byte when
 * it is ready.  The parent exits with 0 then, or with the exit status of a child
 * that ends before.
 */
static int
detach(void)
{
	int p[2], status;
	char ready;
	ssize_t n;
	pid_t pid;

	if (pipe2(p, O_CLOEXEC) == -1)
		die(1, "pipe:");
	if ((pid = fork()) == -1)
		die(1, "fork:");
	if (pid == 0) {
		close(p[0]);
		setsid();
		return p[1];
	}
	close(p[1]);
	do
		n = read(p[0], &ready, 1);
	while (n == -1 && errno == EINTR);
	if (n == 1)
		_exit(0);
	if (waitpid(pid, &status, 0) == pid && WIFEXITED(status))
		_exit(WEXITSTATUS(status));
	_exit(1);
}

static void
attach_nothing(int ready, int level)
{
	int none = open("/dev/null", O_RDWR);

	if (chdir("/") == -1 || none == -1)
		die(1, "/dev/null:");
	log_open(level, 0);
	dup2(none, 0);
	dup2(none, 1);
	dup2(none, 2);
	close(none);
	if (write(ready, "", 1) == -1)
		logmsg(LOG_WARNING, "cannot notify the parent process");
	close(ready);
}

/* For -n: warn of what the start would not find.  Another user may run -n, and so
 * these are no errors. */
static void
warn_missing(const struct conf *c)
{
	struct stat st;

	if (c->user != NULL && find_user(c->user) == NULL)
		logmsg(LOG_WARNING, no_such_user, c->user);
	if (stat(c->tempdir, &st) == 0 ? !S_ISDIR(st.st_mode) :
	    errno == ENOENT || errno == ENOTDIR)
		logmsg(LOG_WARNING, "TempDirectory: %s is not a directory of "
		    "this system", c->tempdir);
}

/* From the settings to the loop.  Returns 0, or -1 after an error, which has been
 * logged. */
static int
start(int background, int level)
{
	int ready = -1;

	notify_open();
	listeners_inherit();
	/* systemd accepts messages of the process that it has started only. */
	if (background && getenv("NOTIFY_SOCKET") == NULL)
		ready = detach();
	atexit(remove_files);
	signals_open();
	if (set_limits(conf) == -1 || listeners_open(conf, 1) == -1)
		return -1;
	if (conf->pidfile != NULL)
		pid_file_create(conf->pidfile);
	if (conf->user != NULL)
		drop_privileges(conf->user);
	drop_capabilities();
	user_name();
	if (try_tempdir(conf) == -1)
		return -1;
	if (ready != -1)
		attach_nothing(ready, level);
	else if (background)
		log_open(level, 0);
	log_echo = 0;
	if (geteuid() == 0)
		logmsg(LOG_WARNING, "running as root is NOT recommended");
	sandbox(conf);
	settings_begin();
	notify("READY=1", -1);
	notify_ready = 1;
	return 0;
}

int
main(int argc, char **argv)
{
	const char *file;
	int level, console, background;

	if (argc == 0)
		return 2;
	process_begin(listen_fds());
	options_read(argv);
	file = given['f'] ? given['f'] : CONFFILE;
	level = given['d'] ? *given['d'] - '0' : LOG_INFO - LOG_ERR;
	console = given['d'] && !given['F'];
	background = !given['d'] && !given['F'];
	count.started = time(NULL);
	if (given['n'] || given['C'])	/* -n tells the new names of old settings */
		log_level = given['n'] ? LOG_INFO : LOG_ERR;
	else if (!background) {
		log_open(level, console);
		log_echo = !console;
	}
	log_held = 1;
	flags_warn(file);
	conf = conf_load(file, flags, nflags, given['p']);
	log_format(conf != NULL && conf->json && !given['n'] && !given['C']);
	if (conf == NULL)
		return 2;
	if (given['n']) {
		warn_missing(conf);
		conf_show(conf);
		return 0;
	}
	if (given['C'])
		return check_health(conf);
	if (start(background, level) == -1)
		return 1;
	loop();
	sessions_shutdown(0, 1);	/* the kernel closes the rest */
	children_kill();
	log_wait = 1000;
	logmsg(LOG_NOTICE, "stopped");
	return 0;
}
