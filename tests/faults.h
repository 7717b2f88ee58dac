/*
 * A test build in which any system call or allocation of the daemon can fail:
 *
 *	make BIN=PROGRAM CPPFLAGS='-include tests/faults.h'
 *	FAULT='recv:7:0:104 malloc:3:2:12' PROGRAM -d 4 -f FILE
 *
 * KIND:N:STEP:ERRNO makes the N-th call of this kind fail, and each STEP-th call
 * after it (0: none).  With ERRNO 0 the call does not fail, but moves only one
 * byte.  With ERRNO -1 the process halts (SIGSTOP) before the call.  The calls of
 * all processes, children included, are counted in struct faults.  If FAULTS names
 * a file, the struct is mapped from it, and a test can read the counts and turn
 * all faults `off'.
 */

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct faults {
	uint64_t off;
	struct {
		uint64_t name;		/* its first 8 bytes */
		uint64_t calls;
	} kind[255];
};

/* Weak: every source file has these, the program has them once. */
#define ONCE	__attribute__((weak))

ONCE struct faults *faults;
ONCE int fault_short;

ONCE void
faults_open(void)
{
	static struct faults here;
	const char *path = getenv("FAULTS");
	int fd = path != NULL ? open(path, O_RDWR) : -1;

	faults = &here;
	if (fd == -1)
		return;
	faults = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED,
	    fd, 0);
	if (faults == MAP_FAILED)
		abort();
	close(fd);
}

/* The number of this call; no lock, for its holder might be killed. */
ONCE unsigned
fault_count(const char *kind)
{
	uint64_t name = 0, there;
	int i;

	memcpy(&name, kind, strnlen(kind, sizeof name));
	for (i = 0; ; i++) {
		there = __sync_val_compare_and_swap(&faults->kind[i].name, 0,
		    name);
		if (there == 0 || there == name)
			break;
	}
	return __sync_add_and_fetch(&faults->kind[i].calls, 1);
}

/* Whether this call fails, errno set; if not, whether it is a short one. */
ONCE int
fault(const char *kind)
{
	const char *p = getenv("FAULT");
	unsigned n, first, step;
	char name[16];
	int err, used;

	if (faults == NULL)
		faults_open();
	n = fault_count(kind);
	fault_short = 0;
	for (; p != NULL && sscanf(p, " %15[^:]:%u:%u:%d%n", name, &first,
	    &step, &err, &used) == 4; p += used) {
		if (strcmp(name, kind) != 0 || faults->off || n < first ||
		    (step == 0 ? n > first : (n - first) % step != 0))
			continue;
		if (err == -1)
			raise(SIGSTOP);
		if (err <= 0) {
			fault_short = err == 0;
			return 0;
		}
		errno = err;
		return 1;
	}
	return 0;
}

/* A socket that fails like this is of no use from then on. */
ONCE int
fault_socket(const char *kind, int fd)
{
	int err;

	if (!fault(kind))
		return 0;
	err = errno;
	if (err == EPIPE || err == ECONNRESET || err == ETIMEDOUT)
		shutdown(fd, SHUT_RDWR);
	errno = err;
	return 1;
}

ONCE size_t
fault_cut(size_t n)
{
	return fault_short && n > 1 ? 1 : n;
}

ONCE ssize_t
fault_pwritev(int fd, const struct iovec *v, int n, off_t at)
{
	if (!fault_short)
		return pwritev(fd, v, n, at);
	for (; n > 1 && v->iov_len == 0; n--)
		v++;
	return pwrite(fd, v->iov_base, 1, at);
}

/* A pipe takes as much as a child's answer whole or not at all. */
ONCE size_t
fault_cut_file(int fd, size_t n)
{
	struct stat st;

	return fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode) ? n : fault_cut(n);
}

/* A macro is not expanded within itself: the inner name is the function's. */
#define FAULTY(name, bad, args)	(fault(#name) ? bad : name args)

#define accept4(...)	FAULTY(accept4, -1, (__VA_ARGS__))
#define bind(...)	FAULTY(bind, -1, (__VA_ARGS__))
#define chdir(...)	FAULTY(chdir, -1, (__VA_ARGS__))
#define connect(...)	FAULTY(connect, -1, (__VA_ARGS__))
#define dup2(...)	FAULTY(dup2, -1, (__VA_ARGS__))
#define execl(...)	FAULTY(execl, -1, (__VA_ARGS__))
#define fcntl(...)	FAULTY(fcntl, -1, (__VA_ARGS__))
#define fork(...)	FAULTY(fork, -1, (__VA_ARGS__))
#define fstat(...)	FAULTY(fstat, -1, (__VA_ARGS__))
#define fsync(...)	FAULTY(fsync, -1, (__VA_ARGS__))
#define ftruncate(...)	FAULTY(ftruncate, -1, (__VA_ARGS__))
#define getaddrinfo(...) FAULTY(getaddrinfo, EAI_MEMORY, (__VA_ARGS__))
#define getcwd(...)	FAULTY(getcwd, NULL, (__VA_ARGS__))
#define getpwnam(...)	FAULTY(getpwnam, NULL, (__VA_ARGS__))
#define getrlimit(...)	FAULTY(getrlimit, -1, (__VA_ARGS__))
#define getsockname(...) FAULTY(getsockname, -1, (__VA_ARGS__))
#define getsockopt(...)	FAULTY(getsockopt, -1, (__VA_ARGS__))
#define initgroups(...)	FAULTY(initgroups, -1, (__VA_ARGS__))
#define link(...)	FAULTY(link, -1, (__VA_ARGS__))
#define listen(...)	FAULTY(listen, -1, (__VA_ARGS__))
#define mkostemp(...)	FAULTY(mkostemp, -1, (__VA_ARGS__))
#define open(...)	FAULTY(open, -1, (__VA_ARGS__))
#define pipe2(...)	FAULTY(pipe2, -1, (__VA_ARGS__))
#define poll(...)	FAULTY(poll, -1, (__VA_ARGS__))
#define prctl(...)	FAULTY(prctl, -1, (__VA_ARGS__))
#define rename(...)	FAULTY(rename, -1, (__VA_ARGS__))
#define setgid(...)	FAULTY(setgid, -1, (__VA_ARGS__))
#define setrlimit(...)	FAULTY(setrlimit, -1, (__VA_ARGS__))
#define setsockopt(...)	FAULTY(setsockopt, -1, (__VA_ARGS__))
#define setuid(...)	FAULTY(setuid, -1, (__VA_ARGS__))
#define socket(...)	FAULTY(socket, -1, (__VA_ARGS__))
#define syscall(...)	FAULTY(syscall, -1, (__VA_ARGS__))
#define unlink(...)	FAULTY(unlink, -1, (__VA_ARGS__))
#define waitpid(...)	FAULTY(waitpid, -1, (__VA_ARGS__))

#define pread(f, p, n, at) FAULTY(pread, -1, (f, p, fault_cut(n), at))
#define pwrite(f, p, n, at) FAULTY(pwrite, -1, (f, p, fault_cut(n), at))
#define read(f, p, n)	FAULTY(read, -1, (f, p, fault_cut(n)))
#define recv(f, p, n, flags) (fault_socket("recv", f) ? -1 : \
    recv(f, p, fault_cut(n), flags))
#define send(f, p, n, flags) (fault_socket("send", f) ? -1 : \
    send(f, p, fault_cut(n), flags))
#define sendfile(to, f, at, n) (fault_socket("sendfile", to) ? -1 : \
    sendfile(to, f, at, fault_cut(n)))
/* One byte is a signal's: it can fail only where others wait already. */
#define write(f, p, n)	((n) > 1 && fault("write") ? -1 : \
    write(f, p, fault_cut_file(f, n)))
#define pwritev(f, v, n, at) (fault("pwritev") ? -1 : \
    fault_pwritev(f, v, n, at))

/* All that get memory are one kind. */
#define malloc(n)	(fault("malloc") ? NULL : malloc(n))
#define calloc(n, size)	(fault("malloc") ? NULL : calloc(n, size))
#define realloc(p, n)	(fault("malloc") ? NULL : realloc(p, n))
#define strdup(s)	(fault("malloc") ? NULL : strdup(s))
#define strndup(s, n)	(fault("malloc") ? NULL : strndup(s, n))
