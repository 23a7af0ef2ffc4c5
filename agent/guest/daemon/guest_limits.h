/* Every limit of the guest daemon, with its reason. The first block is the protocol's (agent/wire/limits.py). */
#ifndef CAPSULE_GUEST_LIMITS_H
#define CAPSULE_GUEST_LIMITS_H

#define KIB 1024
#define MIB (1024 * 1024)

#define PROTOCOL_VERSION 1
#define MAX_FRAME_BYTES (2 * MIB)
#define MAX_DATA_BYTES (64 * KIB)
#define MAX_DEPTH 16
#define MAX_FEATURES 32
#define MAX_NAME_CHARS 64
#define MAX_TEXT_CHARS 4096
#define INITIAL_CREDIT (256 * KIB)
#define MAX_CREDIT (16 * MIB)
#define MAX_STREAM_ID 0x7fffffffU
#define MAX_TIMEOUT_MS 0x7fffffffU
#define HELLO_TIMEOUT_NS (10ULL * 1000000000ULL)

/* The host keeps one connection; the rest is room for those of before a restore, until keep-alive finds them dead. */
#define MAX_CONNECTIONS 32

/* Announced in HELLO. A stream stays open while a child works for it, which the limits below bound, or while it is
 * attached to one, which costs 200 bytes. */
#define MAX_STREAMS 1024
#define MAX_FOREGROUND 256
#define MAX_BACKGROUND 256
/* As many transfers as the host lets in (LIVE in agent/sandboxes/gate.py), and room for short ones beside them. */
#define MAX_OPERATIONS 320
/* settle, configure: they must work while all the others wait for a dead disk, and may themselves be stuck in one. */
#define MAX_SYSTEM 8

/* Descriptors of the daemon: three for each process, three for a worker, and some. The kernel gives PID 1 a limit of 1024
 * that it may raise to 4096. */
#define MAX_DESCRIPTORS 4096

/* Above this nothing more is read for a connection, neither from it nor from its children: a reader that stalls
 * costs this much, one DATA frame and one reply. */
#define OUTPUT_HIGH_WATER (256 * KIB)

/* Above this no more output of a process or content of a file is queued, but the next LIGHT_BYTES of a stream of which
 * nothing waits: what a quiet terminal prints then waits behind this much and one DATA frame of a flood, not more. */
#define BULK_WATER (64 * KIB)
#define LIGHT_BYTES (4 * KIB)
/* What the kernel holds unsent beside it. */
#define UNSENT_BYTES (64 * KIB)

/* Credit is granted in steps, so that a byte-wise reader of stdin does not cause a frame a byte. */
#define CREDIT_STEP (64 * KIB)

/* One recv. Larger frames grow the buffer to the frame's size; one of more than KEPT_BYTES shrinks again. What bulk data
 * needs is kept: memory that is given back comes anew a page fault at a time. */
#define READ_BYTES (64 * KIB)
#define KEPT_BYTES (256 * KIB)

/* The pipe of a foreground process's output, and those of workers for contents of files: a turn of the one side is four
 * of the other. */
#define BULK_PIPE_BYTES (256 * KIB)

/* From this much on a frame's bytes go from the pipe to the socket by splice(2): under emulation the two copies are a third
 * of the guest's work for them. For less, the calls it takes cost more. */
#define SPLICE_BYTES (16 * KIB)

/* The last output of a detached process; also how far it may be ahead of its reader. */
#define RING_BYTES (64 * KIB)

/* Of processes that have ended: their end and their ring, for who attaches too late. */
#define MAX_ENDED 64
#define KEEP_ENDED_NS (600ULL * 1000000000ULL)

#define MAX_TERMINAL_CELLS 4096
/* What a terminal may still hold when its process has ended: more than the kernel's buffers. */
#define TERMINAL_REST_BYTES (256 * KIB)

/* What processes.list shows of cmd and args together, of user and of cwd, in a reply of at most LIST_BYTES: that fits
 * into the largest frame that the host takes from a guest (MAX_GUEST_FRAME_BYTES in agent/guest/client.py). Of many
 * processes it shows less of each. */
#define LISTED_BYTES KIB
#define LIST_BYTES (188 * KIB)

/* After the direct child's exit its grandchildren may hold the pipes; output already on its way gets this long. */
#define EXIT_GRACE_NS (100ULL * 1000000ULL)

/* A killed child stuck in the kernel (dead disk) is answered for after this. */
#define KILL_PATIENCE_NS (5ULL * 1000000000ULL)

/* settle, when the host does not say: half of the first is for freezing, half for sync(2). The second is long for
 * copying what changed in a large memory (the clock stands still then), and short for a guest that was forgotten. */
#define SETTLE_TIMEOUT_MS 3000
#define SETTLE_THAW_AFTER_MS 60000

/* Groups that are tried for a new process when the user has made the one of before unusable. */
#define MAX_START_GROUPS 4

#define MACHINE_ID_CHARS 32
#define MAX_PATH_BYTES 4096
#define MAX_TAG_BYTES 128
#define MAX_USER_BYTES 128
#define MAX_ARGUMENTS 32768
#define MAX_ENVS 1024
#define MAX_DEFAULT_ENVS_BYTES (128 * KIB)
#define MAX_GROUPS 64
#define MAX_HOSTNAME_BYTES 64
#define MAX_NAMESERVERS 3
#define MAX_ENTROPY_BYTES 512

/* One notice with directory entries. An entry with the worst possible names is 26 KiB. */
#define NOTICE_BYTES (32 * KIB)
#define MAX_LIST_DEPTH 64
/* Names of one directory are held for sorting: about 8 MiB of the worker at worst for usual names. */
#define MAX_DIRECTORY_NAMES 100000

/* files.watch: of their own kind, for they last. The kernel bounds the directories of all of them together, by memory. */
#define MAX_WATCHES 32
#define MAX_WATCHED 8192
/* What a walk tells of a new directory before the kernel does; of more than that some may be told twice. */
#define MAX_TOLD 1024

/* The longest record a worker sends: a notice and its envelope. */
#define MAX_RECORD_BYTES (NOTICE_BYTES + 4 * KIB)

#define DISK_WAIT_MS 10000
#define LINK_WAIT_MS 5000

#endif
