/* Whose turn it is to ask for the GIL, among threads whose commits are done.
 *
 * A thread that asks for the GIL while another has it sleeps, and it takes longer to
 * wake than to run to its next commit (18 us beside 5). So where many commits end at
 * once, and all ask, the GIL lies idle most of the time and goes from sleeper to
 * sleeper. Here they ask one after another, and who is not to ask yet stays awake, and
 * leaves the processor to anybody else who wants it.
 *
 * Nobody depends on it: a turn that is kept is taken away, and nobody waits for long.
 * One turnstile per process, as there is one GIL; without a GIL there is none.
 */
#ifndef METASTORE_TURNSTILE_H
#define METASTORE_TURNSTILE_H

#ifdef Py_GIL_DISABLED

static void ms_turn_await(void) {}
static void ms_turn_begin(void) {}
static void ms_turn_end(void) {}
static void ms_turn_hold(void) {}
static void ms_turn_forget(void) {}

#else

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

/* Nanoseconds. After so long, since its owner has got the GIL, a turn is over: the owner
 * computes, or has let the GIL go elsewhere, which nobody can see. */
#define MS_TURN_MAX 10000
/* One whose owner asks for the GIL that long is free to take: somebody else keeps it. */
#define MS_ASKING_MAX 20000000
/* Somebody else keeps the GIL if one turn is seen to last that long: then to sleep before
 * it is better. It has to be seen twice, since the time alone also passes in the queue
 * for a processor. */
#define MS_STUCK_MAX 40000
/* Nobody waits for longer: as long as the interpreter lets a thread keep the GIL. */
#define MS_AWAIT_MAX 5000000

/* Who waits that long for the GIL gets it from somebody who does not give it back by
 * itself, as a thread that spins, and who asks for it again at once. */
#define MS_LONG_WAIT 1000000
/* The first that gets it so keeps it that long, where others wait: the one that lost it
 * is awake by then, finds it kept, and lines up behind them. Else it comes in between
 * two of them, and they wait for another switch interval. */
#define MS_HOLD 60000

/* When it began, in even numbers; odd as long as its owner asks; 0: nobody's. */
static _Atomic uint64_t ms_turn;
static _Thread_local uint64_t ms_own_turn;
/* How many ask without a turn, and since when this thread does, if it has none. */
static _Atomic int ms_n_turnless;
static _Thread_local uint64_t ms_turnless_since;
/* When somebody last got the GIL after a long wait, and what follows for this thread. */
static _Atomic uint64_t ms_last_long_wait;
static _Thread_local uint64_t ms_hold_until;

static uint64_t ms_even_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) & ~UINT64_C(1);
}

static int ms_turn_is_free(uint64_t turn, uint64_t now) {
    /* Signed: it may have begun after `now` was read. */
    return !turn || (int64_t)(now - turn) > (turn & 1 ? MS_ASKING_MAX : MS_TURN_MAX);
}

/* Return when this thread is to ask for the GIL. */
static void ms_turn_await(void) {
    uint64_t begin = ms_even_clock(), now = begin, seen = 0, seen_since = begin;
    do {
        uint64_t turn = atomic_load(&ms_turn);
        if (ms_turn_is_free(turn, now)) {
            if (atomic_compare_exchange_strong(&ms_turn, &turn, now | 1)) {
                ms_own_turn = now | 1;
                return;
            }
        } else if (turn != seen) {
            seen = turn;
            seen_since = now;
        } else if (now - seen_since > MS_STUCK_MAX) {
            break;
        }
        sched_yield();
        now = ms_even_clock();
    } while (now - begin < MS_AWAIT_MAX);
    ms_turnless_since = now;
    atomic_fetch_add(&ms_n_turnless, 1);
}

/* This thread has got the GIL. */
static void ms_turn_begin(void) {
    uint64_t own = ms_own_turn, now = ms_even_clock();
    uint64_t since = own ? own : ms_turnless_since;
    if (own)
        ms_own_turn = atomic_compare_exchange_strong(&ms_turn, &own, now) ? now : 0;
    else
        atomic_fetch_sub(&ms_n_turnless, 1);
    /* Signed: a turn's number may be ahead of the clock by one. */
    if ((int64_t)(now - since) > MS_LONG_WAIT) {
        uint64_t last = atomic_exchange(&ms_last_long_wait, now);
        if ((int64_t)(now - last) > MS_LONG_WAIT && atomic_load(&ms_n_turnless) > 0)
            ms_hold_until = now + MS_HOLD;
    }
}

/* This thread, which has the GIL, is about to let it go. */
static void ms_turn_hold(void) {
    uint64_t until = ms_hold_until;
    ms_hold_until = 0;
    while (until && ms_even_clock() < until) {
    }
}

/* This process was forked: the other threads are not here. */
static void ms_turn_forget(void) {
    atomic_store(&ms_turn, 0);
    atomic_store(&ms_n_turnless, 0);
}

/* This thread has let the GIL go: the next one may ask. */
static void ms_turn_end(void) {
    uint64_t own = ms_own_turn;
    if (own) {
        ms_own_turn = 0;
        atomic_compare_exchange_strong(&ms_turn, &own, 0);
    }
}

#endif
#endif
