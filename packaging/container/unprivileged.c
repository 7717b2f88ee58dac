/*
 * This library lets Postfix run as one ordinary user from start to end.
 * Postfix insists on being started as root, only to become that user in each of
 * its processes.  A container under Pod Security "restricted" has no root.  With
 * this library in LD_PRELOAD each process believes that it began as root and
 * changed its user.  The kernel does not: a process gains no right by it.
 */
#include <grp.h>
#include <unistd.h>

static uid_t uid, euid;

uid_t
getuid(void)
{
	return uid;
}

uid_t
geteuid(void)
{
	return euid;
}

int
setuid(uid_t id)
{
	uid = euid = id;
	return 0;
}

int
seteuid(uid_t id)
{
	euid = id;
	return 0;
}

int
setgid(gid_t id)
{
	(void)id;
	return 0;
}

int
setegid(gid_t id)
{
	(void)id;
	return 0;
}

int
setgroups(size_t n, const gid_t *groups)
{
	(void)n, (void)groups;
	return 0;
}

int
initgroups(const char *user, gid_t group)
{
	(void)user, (void)group;
	return 0;
}

int
chown(const char *path, uid_t owner, gid_t group)
{
	(void)path, (void)owner, (void)group;
	return 0;
}

int
fchown(int fd, uid_t owner, gid_t group)
{
	(void)fd, (void)owner, (void)group;
	return 0;
}

int
fchownat(int fd, const char *path, uid_t owner, gid_t group, int flags)
{
	(void)fd, (void)path, (void)owner, (void)group, (void)flags;
	return 0;
}
