/* Preloaded (LD_PRELOAD) into a daemon under test: every fsync(2) takes so many milliseconds longer as stand in the
   file that SLOW_FSYNC names, before the kernel is asked. What stands there may change meanwhile. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define STEP 10

static unsigned wanted(void)
{
    const char *path = getenv("SLOW_FSYNC");
    FILE *file = path ? fopen(path, "re") : NULL;
    unsigned milliseconds = 0;

    if (file) {
        if (fscanf(file, "%u", &milliseconds) != 1)
            milliseconds = 0;
        fclose(file);
    }
    return milliseconds;
}

int fsync(int fd)
{
    static int (*real)(int);

    for (unsigned passed = 0; passed < wanted(); passed += STEP)
        usleep(1000 * STEP);
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return real(fd);
}
