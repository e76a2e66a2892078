// Scratch of one call, aligned to cache lines and given back at the end.
template <class T> struct Scratch {
  T* data;
  int64_t each;   // elements per thread, a whole number of cache lines
  explicit Scratch(int64_t size, int64_t threads = 1) {
    each = round_up(size > 0 ? size : 1, 64);
    data = (T*)aligned_alloc(64, size_t(each * threads) * sizeof(T));
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  T* of(int thread) const { return data + thread * each; }
  bool ok() const { return data != nullptr; }
};

// Threads worth starting for so many multiply-adds.
INLINE int useful_threads(int64_t threads, int64_t work) {
  const int64_t most = 1 + work / 500000;
  return int(threads < most ? threads : most);
}
