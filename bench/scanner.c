/*
 * A clamd that reports every message as clean, at once.
 * usage: scanner <&SOCKET
 *
 * Standard input is a listening unix socket.  The scanner knows the commands of
 * the programs compared: zINSTREAM and zPING of clamsmtpd, and `SCAN path' of
 * ClamSMTP 1.10.
 */

#include <sys/socket.h>

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Read chunks, each a length and as many bytes.  The length 0 ends them. */
static void
serve_stream(int fd, const char *p, size_t n)
{
	static char in[65536];
	uint32_t length = 0, left = 0;
	int digits = 0;
	ssize_t r;

	for (;; p = in, n = r) {
		while (n > 0) {
			if (left > 0) {
				size_t k = n < left ? n : left;

				p += k;
				n -= k;
				left -= k;
				continue;
			}
			length = length << 8 | (unsigned char)*p++;
			n--;
			if (++digits < 4)
				continue;
			digits = 0;
			if ((left = length) == 0) {
				(void)!write(fd, "stream: OK", 11);
				return;
			}
		}
		if ((r = read(fd, in, sizeof(in))) <= 0)
			return;
	}
}

static void
serve(int fd)
{
	char in[4096];
	size_t have = 0;
	ssize_t n;

	while ((n = read(fd, in + have, sizeof(in) - 6 - have)) > 0) {
		have += n;
		if (have >= 10 && memcmp(in, "zINSTREAM", 10) == 0) {
			serve_stream(fd, in + 10, have - 10);
			return;
		}
		if (have >= 6 && memcmp(in, "zPING", 6) == 0) {
			(void)!write(fd, "PONG", 5);
			return;
		}
		if (have > 5 && memcmp(in, "SCAN ", 5) == 0 &&
		    in[have - 1] == '\n') {
			memcpy(in + have - 1, ": OK\n", 5);
			(void)!write(fd, in + 5, have - 1);
			return;
		}
	}
}

int
main(void)
{
	int fd;

	signal(SIGPIPE, SIG_IGN);
	while ((fd = accept(0, NULL, NULL)) != -1) {
		serve(fd);
		close(fd);
	}
	perror("accept");
	return 1;
}
