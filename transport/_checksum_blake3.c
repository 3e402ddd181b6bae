/* Keyed BLAKE3 of many blocks: the tree above the compression function, with full lanes at every level of it.
 *
 * https://github.com/BLAKE3-team/BLAKE3-specs, section 2.1: chunks of 1024 bytes are the leaves, parents join two
 * chaining values, the left subtree being the largest power of two of chunks that leaves something to the right. That
 * tree comes out of joining neighbours level by level, an odd one at the end moving up unchanged. The chunks of several
 * blocks are hashed in one go, and so are the parents, so that small blocks too fill all lanes.
 */
#include "_checksum.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK 1024u
enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, KEYED_HASH = 16 };

/* A group of blocks that are hashed together: at most so many, and so many chunks (32 bytes of memory each). Blocks of
 * more chunks are hashed in pieces of so many, each a whole subtree. */
#define GROUP_BLOCKS 16u
#define GROUP_CHUNKS 1024u /* a power of two */

struct tree {
    const struct implementation *implementation;
    uint32_t key[8];
    uint8_t *values, *spare; /* room for the chaining values of one group each; they change places level by level */
};

static void add_to_batch(const struct tree *tree, struct batch *batch, const uint8_t *input, uint64_t counter,
                         uint8_t *output) {
    batch->input[batch->count] = input;
    batch->counter[batch->count] = counter;
    batch->output[batch->count] = output;
    if (++batch->count == BATCH) {
        tree->implementation->hash_batch(batch);
        batch->count = 0;
    }
}

static void finish_batch(const struct tree *tree, struct batch *batch) {
    if (batch->count != 0)
        tree->implementation->hash_batch(batch);
    batch->count = 0;
}

/* The chunk at the end of an input, of 0 to 1023 bytes. */
static void hash_short_chunk(const struct tree *tree, const uint8_t *data, size_t length, uint64_t counter,
                             uint32_t root, uint8_t output[CV_BYTES]) {
    uint32_t chaining[8], flags = KEYED_HASH | CHUNK_START;
    memcpy(chaining, tree->key, sizeof chaining);
    for (; length > 64; data += 64, length -= 64) {
        blake3_compress(chaining, data, counter, 64, flags);
        flags = KEYED_HASH;
    }
    uint8_t last[64] = {0};
    if (length != 0)
        memcpy(last, data, length);
    blake3_compress(chaining, last, counter, (uint32_t)length, flags | CHUNK_END | root);
    blake3_store_chaining(output, chaining);
}

/* From `count` lists of `width` chaining values each, one after the other in tree->values, to one of each. */
static void join_levels(struct tree *tree, size_t count, size_t width, uint32_t root) {
    struct batch batch = {.compressions = 1, .flags = PARENT | KEYED_HASH};
    memcpy(batch.key, tree->key, sizeof batch.key);
    while (width > 1) {
        size_t joined = width / 2 + width % 2;
        if (joined == 1)
            batch.flags |= root;
        for (size_t list = 0; list < count; list++) {
            const uint8_t *from = tree->values + CV_BYTES * width * list;
            uint8_t *to = tree->spare + CV_BYTES * joined * list;
            for (size_t pair = 0; pair < width / 2; pair++)
                add_to_batch(tree, &batch, from + 2 * CV_BYTES * pair, 0, to + CV_BYTES * pair);
            if (width % 2 != 0)
                memcpy(to + CV_BYTES * (joined - 1), from + CV_BYTES * (width - 1), CV_BYTES);
        }
        finish_batch(tree, &batch);
        uint8_t *swap = tree->values;
        tree->values = tree->spare, tree->spare = swap;
        width = joined;
    }
}

/* One chaining value, or digest if root is ROOT, of each of `count` equally long inputs: left in tree->values.
 * first is the number of the inputs' first chunk. At most GROUP_CHUNKS chunks in all. */
static void hash_group(struct tree *tree, const uint8_t *const *inputs, size_t count, size_t length, uint64_t first,
                       uint32_t root) {
    const size_t full = length / CHUNK, rest = length % CHUNK;
    const size_t width = full + (rest != 0 || full == 0);
    const uint32_t leaf_root = width == 1 ? root : 0;
    struct batch batch = {
        .compressions = CHUNK / 64,
        .flags = KEYED_HASH,
        .flags_first = CHUNK_START,
        .flags_last = CHUNK_END | leaf_root,
    };
    memcpy(batch.key, tree->key, sizeof batch.key);
    for (size_t which = 0; which < count; which++) {
        uint8_t *to = tree->values + CV_BYTES * width * which;
        for (size_t chunk = 0; chunk < full; chunk++)
            add_to_batch(tree, &batch, inputs[which] + CHUNK * chunk, first + chunk, to + CV_BYTES * chunk);
        if (width > full)
            hash_short_chunk(tree, inputs[which] + CHUNK * full, rest, first + full, leaf_root, to + CV_BYTES * full);
    }
    finish_batch(tree, &batch);
    join_levels(tree, count, width, root);
}


static size_t chunks_of(size_t length) { return length == 0 ? 1 : length / CHUNK + (length % CHUNK != 0); }

/* Room for groups of so many chaining values. To be freed with free(*memory). */
static int tree_set_up(struct tree *tree, const struct implementation *implementation, const uint32_t key[8],
                       size_t values, uint8_t **memory) {
    *memory = malloc(2 * CV_BYTES * values);
    if (*memory == NULL)
        return -1;
    tree->implementation = implementation;
    memcpy(tree->key, key, sizeof tree->key);
    tree->values = *memory;
    tree->spare = *memory + CV_BYTES * values;
    return 0;
}

/* An input of more than GROUP_CHUNKS chunks: whole subtrees first, then what joins them. */
static int hash_long(struct tree *tree, const uint8_t *data, size_t length, uint8_t digest[CV_BYTES]) {
    const size_t piece = (size_t)GROUP_CHUNKS * CHUNK;
    const size_t pieces = length / piece + (length % piece != 0);
    struct tree top;
    uint8_t *memory;
    if (tree_set_up(&top, tree->implementation, tree->key, pieces, &memory) != 0)
        return -1;
    for (size_t which = 0; which < pieces; which++) {
        const uint8_t *input = data + piece * which;
        size_t left = length - piece * which;
        hash_group(tree, &input, 1, left < piece ? left : piece, (uint64_t)GROUP_CHUNKS * which, 0);
        memcpy(top.values + CV_BYTES * which, tree->values, CV_BYTES);
    }
    join_levels(&top, 1, pieces, ROOT);
    memcpy(digest, top.values, CV_BYTES);
    free(memory);
    return 0;
}

static int hash_any(struct tree *tree, const uint8_t *data, size_t length, uint8_t digest[CV_BYTES]) {
    if (chunks_of(length) > GROUP_CHUNKS)
        return hash_long(tree, data, length, digest);
    hash_group(tree, &data, 1, length, 0, ROOT);
    memcpy(digest, tree->values, CV_BYTES);
    return 0;
}

int blake3_keyed(const struct implementation *implementation, const uint8_t *data, size_t length,
                 const uint8_t key[KEY_BYTES], uint8_t digest[CV_BYTES]) {
    const size_t chunks = chunks_of(length);
    struct tree tree;
    uint8_t *memory;
    uint32_t words[8];
    blake3_load_key(words, key);
    if (tree_set_up(&tree, implementation, words, chunks < GROUP_CHUNKS ? chunks : GROUP_CHUNKS, &memory) != 0)
        return -1;
    int result = hash_any(&tree, data, length, digest);
    free(memory);
    return result;
}

/* Equally long blocks waiting to be hashed together. */
struct group {
    const uint8_t *input[GROUP_BLOCKS];
    uint8_t *digest[GROUP_BLOCKS];
    size_t count, capacity;
};

static void hash_waiting(struct tree *tree, struct group *group, const struct digest_request *request) {
    if (group->count == 0)
        return;
    hash_group(tree, group->input, group->count, request->block_size, 0, ROOT);
    for (size_t which = 0; which < group->count; which++)
        memcpy(group->digest[which], tree->values + CV_BYTES * which, request->digest_size);
    group->count = 0;
}

/* The digest of a block of zeros: of zeros of our own, as another thread may be writing to the caller's. */
static int hash_zeros(struct tree *tree, size_t block_size, uint8_t digest[CV_BYTES]) {
    uint8_t *zeros = calloc(block_size, 1);
    if (zeros == NULL)
        return -1;
    int result = hash_any(tree, zeros, block_size, digest);
    free(zeros);
    return result;
}

static int digest_all(struct tree *tree, struct group *group, const struct digest_request *request) {
    uint8_t digest[CV_BYTES], zeros_digest[CV_BYTES];
    int zeros_known = 0;
    const uint8_t *data = request->data;
    uint8_t *out = request->digests;
    size_t left = request->length;
    for (size_t block = 0; left != 0; block++, out += request->digest_size) {
        const size_t size = left < request->block_size ? left : request->block_size;
        const int zero = request->implementation->is_zero(data, size);
        if (request->zeros != NULL)
            request->zeros[block] = (uint8_t)zero;
        if (zero && size == request->block_size) {
            if (!zeros_known && hash_zeros(tree, size, zeros_digest) != 0)
                return -1;
            zeros_known = 1;
            memcpy(out, zeros_digest, request->digest_size);
        } else if (size == request->block_size && group->capacity > 1) {
            group->input[group->count] = data;
            group->digest[group->count] = out;
            if (++group->count == group->capacity)
                hash_waiting(tree, group, request);
        } else {
            if (hash_any(tree, data, size, digest) != 0)
                return -1;
            memcpy(out, digest, request->digest_size);
        }
        data += size, left -= size;
    }
    hash_waiting(tree, group, request);
    return 0;
}

int blake3_digest_blocks(const struct digest_request *request) {
    if (request->length == 0)
        return 0;
    const size_t per_block = chunks_of(request->block_size);
    const size_t blocks = request->length / request->block_size + (request->length % request->block_size != 0);
    struct group group = {.capacity = GROUP_CHUNKS / per_block};
    if (group.capacity > GROUP_BLOCKS)
        group.capacity = GROUP_BLOCKS;
    if (group.capacity > blocks)
        group.capacity = blocks;
    const size_t values = group.capacity > 1 ? group.capacity * per_block : per_block;
    struct tree tree;
    uint8_t *memory;
    uint32_t key[8];
    blake3_load_key(key, request->key);
    if (tree_set_up(&tree, request->implementation, key, values < GROUP_CHUNKS ? values : GROUP_CHUNKS, &memory) != 0)
        return -1;
    int result = digest_all(&tree, &group, request);
    free(memory);
    return result;
}
