# For GNU make.  CC, CPPFLAGS, CFLAGS, LDFLAGS, PREFIX and SYSCONFDIR count from
# the environment as well as from the command line; DESTDIR is for packages.
# Without CC: musl-gcc where there is one, else cc.
#
# Smaller, for a router with no room, and without the hardening:
#   make HARDEN= CFLAGS='-Os -fno-pie' \
#       LDFLAGS='-static -s -Wl,-z,norelro,-z,noseparate-code'

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
SBINDIR = $(PREFIX)/sbin
MANDIR = $(PREFIX)/share/man
BIN = clamsmtpd

ifeq ($(origin CC),default)
CC := $(shell command -v musl-gcc || echo cc)
endif

# The program is static, and a PIE where the compiler links static ones; its
# short relocations need musl 1.2.4.  With glibc it is dynamic: getpwnam(3) would
# load glibc's libraries at run time.
H := \#
STATIC = $(shell \
	if printf '%sinclude <limits.h>\n' '$H' | $(CC) -x c -E -dM - | \
	    grep -q __GLIBC__; then :; \
	elif $(CC) -static-pie '-$H$H$H' -x c /dev/null 2>&1 | \
	    grep -q rcrt1; then \
		echo -static-pie -fPIE -Wl,-z,pack-relative-relocs; \
	else echo -static; fi)

# Both come before the packager's flags, which can therefore undo them.
HARDEN = -fstack-protector-strong -Wl,-z,relro,-z,now
# Leave out functions that are not used.  binutils 2.44 can put all that is only
# read into one segment, a page less.
SECTIONS = -ffunction-sections -fdata-sections -Wl,--gc-sections$(shell \
	$(CC) -Wl,--help 2>/dev/null | grep -q -e ' --rosegment' && \
	echo ,--rosegment)

# -Oz is -Os and a little more; gcc has it since 12.
CFLAGS ?= $(shell $(CC) -Oz -x c -S -o /dev/null /dev/null 2>/dev/null && \
	echo -Oz || echo -Os)
LDFLAGS ?= $(STATIC) -s

ALL_CFLAGS = -std=c99 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 \
	-DCONFFILE='"$(SYSCONFDIR)/clamsmtpd.conf"' -Wall -Wextra \
	-fno-unwind-tables -fno-asynchronous-unwind-tables \
	$(HARDEN) $(SECTIONS) $(CPPFLAGS) $(CFLAGS)
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
	umask 022; mkdir -p $(DESTDIR)$(SBINDIR) $(DESTDIR)$(MANDIR)/man8 \
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

prove:
	prove/run

.PHONY: all check bench bench-quick soak fuzz prove install clean
