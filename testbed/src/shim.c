/* What a host's agent is told by its clock and by the disk of its state directory. Loaded into it by LD_PRELOAD.
 *
 * VMIRROR_TESTBED_SHIM names a file of which all of this reads two words whenever it is called: seconds that the clock is ahead, and
 * what fails of files below VMIRROR_TESTBED_STATE, a sum of: 1 fsync and fdatasync, 2 reads, 4 none, but fsync and fdatasync wait until that
 * is not said any more. See shim.rs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *words;
static char state[4096];
static size_t length;

__attribute__((constructor)) static void begin(void) {
  /* Not what starts it, and not what it starts: a QEMU has its host's clock. */
  if (strcmp(program_invocation_short_name, "vmirror")) return;
  const char *file = getenv("VMIRROR_TESTBED_SHIM"), *directory = getenv("VMIRROR_TESTBED_STATE");
  int descriptor = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
  if (descriptor >= 0) {
    void *at = mmap(NULL, 2 * sizeof *words, PROT_READ, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (directory) length = strlen(strncpy(state, directory, sizeof state - 1));
    if (at != MAP_FAILED) words = at;
  }
  unsetenv("LD_PRELOAD");
}

static int concerns(int64_t what, int descriptor) {
  char link[64], path[4096];
  if (!words || !(words[1] & what)) return 0;
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t got = readlink(link, path, sizeof path - 1);
  errno = before;
  return got >= (ssize_t)length && length && !strncmp(path, state, length);
}

static int fails(int64_t what, int descriptor) {
  if (!concerns(what, descriptor)) return 0;
  errno = EIO;
  return 1;
}

static void waits(int descriptor) {
  while (concerns(4, descriptor)) usleep(1000);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = (int)syscall(SYS_clock_gettime, clock, now);
  if (!result && words && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += words[0];
  return result;
}

int fsync(int descriptor) {
  waits(descriptor);
  return fails(1, descriptor) ? -1 : (int)syscall(SYS_fsync, descriptor);
}

int fdatasync(int descriptor) {
  waits(descriptor);
  return fails(1, descriptor) ? -1 : (int)syscall(SYS_fdatasync, descriptor);
}

ssize_t read(int descriptor, void *to, size_t bytes) {
  return fails(2, descriptor) ? -1 : syscall(SYS_read, descriptor, to, bytes);
}

ssize_t pread64(int descriptor, void *to, size_t bytes, off_t from) {
  return fails(2, descriptor) ? -1 : syscall(SYS_pread64, descriptor, to, bytes, from);
}
