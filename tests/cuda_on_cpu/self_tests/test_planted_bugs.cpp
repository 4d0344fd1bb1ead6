/*
 * Which bug is seen by what: one program, built three times (none, race, sanitize), runs every
 * planted bug under every schedule and compares with the table below. README.md repeats it.
 *
 * A bug is seen if the launch fails, the result is wrong, or a sanitizer ends the process (so
 * each runs in a process of its own). Then the same kernel without its bug must work, in the
 * same process: a failed launch leaves nothing behind.
 */
#include <fstream>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "control.h"
#include "planted_bugs.h"

#ifndef BUILD
#error "BUILD is 'n' (none), 'r' (race) or 's' (sanitize)"
#endif

/* What sees it, a letter each; capitals: only if cp.async is LATE or MIXED.
 *   f FIFO   l LIFO   r RANDOM   p PRIORITY       of the plain build, for some seed
 *   c        the race checker, under every schedule
 *   s        the sanitizers, under every schedule
 *   a        all builds under all schedules: the launch fails */
struct Expectation {
    const char *bug;
    const char *seen_by;
    const char *text; /* part of the message of c or a; @mark: a line's name; NULL: none */
};

static const Expectation EXPECTED[] = {
    {"no barrier after the wait", "flrpc", "shared memory race"},
    {"no barrier at the loop's end", "flrpc", "shared memory race"},
    {"no wait_group", "FLRPc", "has a cp.async to it under way"},
    {"cp.async never waited for", "a", "@copy was never waited for"},
    {"cp.async never committed", "a", "@copy was never committed"},
    {"cp.async half outside", "a", "not 16 bytes of shared memory"},
    {"divergent barrier", "a",
     "threads 0-39 at the barrier of @other barrier; threads 40-95 at the barrier of @barrier"},
    {"return before a barrier", "a",
     "threads 0-89 at the barrier of @barrier; threads 90-95 returned"},
    {"fewer barriers in one warp", "a",
     "threads 0-31 returned; threads 32-95 at the barrier of @loop"},
    {"a lane is missing", "a", "at the warp operation of @shuffle, mask ffff0000"},
    {"masks do not match", "a", "deadlock, or masks that do not match"},
    {"caller not in its mask", "a", "the calling lane 3 is not in its mask ffff0000"},
    {"shuffle from outside the mask", "a", "which is not in mask"},
    {"shuffles of two lines", "a", "others of mask 0000ffff at @shuffle"},
    {"no __syncwarp", "flrpc", "shared memory race"},
    {"__syncwarp across warps", "flrpc", "shared memory race"},
    {"a shuffle for a barrier", "c", "shared memory race"},
    {"__syncwarp of half a warp", "lrpc", "shared memory race"},
    {"mma in half a warp", "a", "ldmatrix, mma and wgmma need a whole warp"},
    {"ldmatrix: misaligned row", "a", "is not a multiple of 16"},
    {"ldmatrix: row outside", "a", "lane 31's row"},
    {"ldmatrix: another row", "flrp", nullptr},
    {"rows written before the wait", "flrpc", "shared memory race"},
    {"no barrier before the product", "flrpc", "shared memory race"},
    {"registers written before the wait", "FLRP", nullptr},
    {"wgmma never waited for", "a", "@product was never waited for"},
    {"wgmma never committed", "a", "@product was never committed"},
    {"wgmma in three warps", "a", "in a block of 96 threads, not whole warpgroups"},
    {"wgmma: misplaced rows", "a", "not at a step in the first of eight swizzled ones"},
    {"wgmma: rows outside", "a", "are not 16384 bytes of shared memory"},
    {"overflow of dynamic shared memory", "s", nullptr},
    {"overflow of static shared memory", "s", nullptr},
    {"load past the end", "s", nullptr},
    {"cp.async past the end", "s", nullptr},
#ifdef __clang__ /* which turns it into a memcpy and forgets what it knew of the alignment */
    {"misaligned load", "s", nullptr},
#else
    {"misaligned load", "cs", "misaligned access"},
#endif
    {"float4 in an array of float", "s", nullptr},
    {"unwritten shared memory", "flrp", nullptr},
    {"counter read too early", "flrpc", "shared memory race"},
    {"counter set too late", "lrpc", "shared memory race"},
    {"blocks in order", "lrp", nullptr},
};

enum { SEEDS = 8 };

/* text, each "@mark" replaced by "planted_bugs.cu:" and the number of the line so marked. */
static std::string with_lines(const char *text)
{
    std::string result = text;
    std::ifstream source(PLANTED_BUGS_SOURCE);
    check(source.good(), "cannot read %s", PLANTED_BUGS_SOURCE);
    int number = 0;
    for (std::string line; std::getline(source, line);) {
        number++;
        size_t begin = line.find("/* @"), end = line.find(" */");
        if (begin == std::string::npos || end == std::string::npos) continue;
        std::string mark = line.substr(begin + 3, end - begin - 3);
        for (size_t at; (at = result.find(mark)) != std::string::npos;)
            result.replace(at, mark.size(), "planted_bugs.cu:" + std::to_string(number));
    }
    return result;
}

struct Outcome {
    bool seen;
    bool sound_after; /* the correct kernel worked afterwards */
    std::string text;
};

static bool works(const PlantedBug &bug, bool planted, std::string *text)
{
    Floats out, expected;
    hqq_status status = bug.run(planted, out, expected);
    if (text && status != HQQ_OK) *text = hqq_last_error();
    return status == HQQ_OK && out == expected;
}

/* In a child: 0 seen, 1 not seen, 2 the correct kernel failed afterwards; else a sanitizer. */
[[noreturn]] static void run_child(const PlantedBug &bug, int to_parent)
{
    dup2(to_parent, 2);
    std::string text;
    bool seen = !works(bug, true, &text);
    fprintf(stderr, "%s\n", text.c_str());
    bool sound = works(bug, false, &text);
    if (!sound) fprintf(stderr, "afterwards: %s\n", text.c_str());
    fflush(stderr);
    _exit(!sound ? 2 : seen ? 0 : 1);
}

static Outcome run(const PlantedBug &bug)
{
    int ends[2];
    if (pipe(ends) != 0) abort();
    pid_t child = fork();
    if (child == 0) run_child(bug, ends[1]);
    close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;)
        text.append(buffer, static_cast<size_t>(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    bool sanitizer = text.find("AddressSanitizer") != std::string::npos ||
                     text.find("runtime error") != std::string::npos;
    return {code == 0 || sanitizer, code == 0 || code == 1 || sanitizer, text};
}

static const char *const ORDERS[] = {"FIFO", "LIFO", "RANDOM", "PRIORITY"};
static const char *const CP_ASYNC[] = {"LATE", "EARLY", "MIXED"};

static bool has(const char *letters, char letter)
{
    return strchr(letters, letter) != nullptr;
}

/* Whether this build can run the bug at all: out-of-bounds writes would damage the heap. */
static bool tried(const char *seen_by)
{
    return BUILD == 's' || !has(seen_by, 's') || (BUILD == 'r' && has(seen_by, 'c'));
}

static bool expected_seen(const char *seen_by, int order, int cp_async)
{
    if (has(seen_by, 'a')) return true;
    if (BUILD == 'r' && has(seen_by, 'c')) return true;
    if (BUILD == 's' && has(seen_by, 's')) return true;
    char letter = "flrp"[order];
    bool early = strcmp(CP_ASYNC[cp_async], "EARLY") == 0;
    return has(seen_by, letter) || (has(seen_by, static_cast<char>(letter - 32)) && !early);
}

static void test_bug(const PlantedBug &bug, const Expectation &e, int order, int cp_async)
{
    bool by_chance = order >= 2 || strcmp(CP_ASYNC[cp_async], "MIXED") == 0;
    bool expected = expected_seen(e.seen_by, order, cp_async), seen = false;
    for (unsigned seed = 1; seed <= (by_chance && BUILD == 'n' ? SEEDS : 1); seed++) {
        hqqlora_emulated_set_schedule(ORDERS[order], CP_ASYNC[cp_async], seed);
        Outcome outcome = run(bug);
        seen |= outcome.seen;
        check(outcome.sound_after, "%s, %s %s: the correct kernel fails afterwards: %s",
              bug.name, ORDERS[order], CP_ASYNC[cp_async], outcome.text.c_str());
        bool must_say =
            e.text && (has(e.seen_by, 'a') || (BUILD == 'r' && has(e.seen_by, 'c')));
        std::string text = must_say ? with_lines(e.text) : "";
        check(outcome.text.find(text) != std::string::npos,
              "%s, %s %s: the message is %snot \"%s\"", bug.name, ORDERS[order],
              CP_ASYNC[cp_async], outcome.text.c_str(), text.c_str());
        if (seen) break;
    }
    if (BUILD != 'n' && !has(e.seen_by, 'a') && !has(e.seen_by, BUILD == 'r' ? 'c' : 's'))
        return; /* the table gives the plain build's schedules */
    check(seen == expected, "%s, %s %s: %s", bug.name, ORDERS[order], CP_ASYNC[cp_async],
          seen ? "seen, unexpectedly" : "not seen");
}

int main()
{
    check(PLANTED_BUG_COUNT == sizeof EXPECTED / sizeof *EXPECTED, "one expectation a bug");
    for (int i = 0; i < PLANTED_BUG_COUNT; i++) {
        check(strcmp(PLANTED_BUGS[i].name, EXPECTED[i].bug) == 0, "order of the table: %s",
              EXPECTED[i].bug);
        if (!tried(EXPECTED[i].seen_by)) continue;
        for (int order = 0; order < 4; order++)
            for (int cp_async = 0; cp_async < 3; cp_async++) {
                if (BUILD == 's' && (order || cp_async)) continue; /* slow to start */
                test_bug(PLANTED_BUGS[i], EXPECTED[i], order, cp_async);
            }
    }
    return report_checks();
}
