# CC, CFLAGS, LDFLAGS, PREFIX, SYSCONFDIR and DESTDIR are yours to set.
# Without CC: musl-gcc where there is one, else cc.  The binary is static but with
# glibc, whose getpwnam(3) would load its libraries at run time nevertheless.
.POSIX:

PREFIX = /usr/local
SYSCONFDIR = /etc
SBINDIR = $(PREFIX)/sbin
MANDIR = $(PREFIX)/share/man
BIN = clamsmtpd

CC = $$(command -v musl-gcc || echo cc)
# Small: a router has no room for page-aligned sections, nor for relocations.
CFLAGS = -Os -fno-pie -no-pie
STATIC = $$(echo '\#include <limits.h>' | $(CC) -E -dM - | \
	grep -q __GLIBC__ || echo -static)
LDFLAGS = $(STATIC) -s -Wl,--gc-sections,-z,noseparate-code,-z,norelro \
	-Wl,-z,common-page-size=64

ALL_CFLAGS = -std=c99 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 \
	-DCONFFILE='"$(SYSCONFDIR)/clamsmtpd.conf"' -Wall -Wextra \
	-ffunction-sections -fdata-sections \
	-fno-unwind-tables -fno-asynchronous-unwind-tables \
	$(CPPFLAGS) $(CFLAGS)
SRC = clamsmtpd.c smtp.c clamd.c conf.c util.c

all: $(BIN)

$(BIN): $(SRC) clamsmtpd.h
	$(CC) $(ALL_CFLAGS) -o $@ $(SRC) $(LDFLAGS)

check:
	./test.sh

bench: $(BIN)
	bench/run

bench-quick: $(BIN)
	bench/run --quick

soak: $(BIN)
	soak/run

install: $(BIN)
	mkdir -p $(DESTDIR)$(SBINDIR) $(DESTDIR)$(MANDIR)/man8 \
	    $(DESTDIR)$(MANDIR)/man5 $(DESTDIR)$(SYSCONFDIR)
	install -m 755 $(BIN) $(DESTDIR)$(SBINDIR)/clamsmtpd
	install -m 644 clamsmtpd.8 $(DESTDIR)$(MANDIR)/man8/clamsmtpd.8
	install -m 644 clamsmtpd.conf.5 $(DESTDIR)$(MANDIR)/man5/clamsmtpd.conf.5
	test -e $(DESTDIR)$(SYSCONFDIR)/clamsmtpd.conf || \
	    install -m 644 clamsmtpd.conf $(DESTDIR)$(SYSCONFDIR)/clamsmtpd.conf

clean:
	rm -f $(BIN)

fuzz:
	fuzz/run

.PHONY: all check bench bench-quick soak fuzz install clean
