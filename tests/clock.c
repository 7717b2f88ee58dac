/*
 * The clocks of a test build:
 *
 *	make BIN=PROGRAM LDFLAGS=tests/clock.c
 *	CLOCK=FILE PROGRAM ...
 *
 * FILE has two int64_t: the seconds to add to CLOCK_REALTIME, and the value of
 * CLOCK_MONOTONIC.  A test may write others at any time.  CLOCK_MONOTONIC moves
 * only then, however slow the machine is.
 */

#include <sys/mman.h>
#include <sys/syscall.h>

#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static const int64_t *
test_clocks(void)
{
	static const int64_t *p;
	int fd;

	if (p == NULL) {
		fd = open(getenv("CLOCK"), O_RDONLY);
		p = mmap(NULL, 2 * sizeof *p, PROT_READ, MAP_SHARED, fd, 0);
		close(fd);
	}
	return p;
}

int
clock_gettime(clockid_t id, struct timespec *t)
{
	if (id == CLOCK_MONOTONIC) {
		t->tv_sec = test_clocks()[1];
		t->tv_nsec = 0;
		return 0;
	}
	if (syscall(SYS_clock_gettime, id, t) == -1)
		return -1;
	t->tv_sec += test_clocks()[0];
	return 0;
}

time_t
time(time_t *p)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	if (p != NULL)
		*p = t.tv_sec;
	return t.tv_sec;
}
