// Blocks that this thread's calls gave back: fresh pages cost more than the arithmetic of a small batch. Large ones are not kept.
struct Cache {
  static constexpr int slots = 16;
  static constexpr size_t largest = size_t(16) << 20;
  struct Block {
    void* data;
    size_t bytes;
  } block[slots] = {};

  ~Cache() {
    for (auto& b : block) free(b.data);
  }

  // The smallest that is large enough, or a new one.
  __attribute__((noinline)) Block take(size_t bytes) {
    Block* best = nullptr;
    for (auto& b : block)
      if (b.data && b.bytes >= bytes && (!best || b.bytes < best->bytes)) best = &b;
    if (!best || best->bytes > 4 * bytes + 4096) return {aligned_alloc(64, bytes), bytes};
    const Block found = *best;
    *best = {};
    return found;
  }

  // In a free place, or in that of the smallest.
  __attribute__((noinline)) void give(Block back) {
    if (back.bytes > largest) return free(back.data);
    Block* place = &block[0];
    for (auto& b : block)
      if (b.bytes < place->bytes) place = &b;
    free(place->data);
    *place = back;
  }
};
static thread_local Cache cache;

// Scratch of one call, aligned to cache lines.
template <class T> struct Scratch {
  T* data;
  int64_t each;   // elements per thread, a whole number of cache lines
  size_t bytes;
  explicit Scratch(int64_t size, int64_t threads = 1) {
    each = round_up(size > 0 ? size : 1, 64);
    const Cache::Block found = cache.take(size_t(each * threads) * sizeof(T));
    data = (T*)found.data;
    bytes = found.bytes;
  }
  ~Scratch() {
    if (data) cache.give({data, bytes});
  }
  Scratch(const Scratch&) = delete;
  T* of(int thread) const { return data + thread * each; }
  bool ok() const { return data != nullptr; }
};

// Threads worth starting for so many multiply-adds.
INLINE int useful_threads(int64_t threads, int64_t work) {
  const int64_t most = 1 + work / 500000;
  return int(threads < most ? threads : most);
}
