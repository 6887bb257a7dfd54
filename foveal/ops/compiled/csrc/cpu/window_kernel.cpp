// The sliding window's three products, one row of one head at a time.
#include "cpu/window_rows.h"

namespace foveal::FOVEAL_ISA {
namespace {

template <class A>
class Products {
 public:
  Products(Arena& arena, const WindowProblem<A>& problem)
      : p(problem),
        cells(p.window_size * p.window_size),
        radius(p.window_size / 2),
        tiles(arena, p.bfloat16_maps, p.width, most(cells, p.d)),
        left_rows(arena, p.window_size, p.width, cells),
        right_rows(arena, p.window_size, p.width, p.d),
        weights(arena.take<A>(cells * lanes<A>)),
        tile(arena.take<A>(p.d * lanes<A>)),
        weight_cells(arena.take<const A*>(cells)),
        right_cells(arena.take<const A*>(cells)) {}

  void prepare() {
    tiles.clear();
    left_rows.clear();
    right_rows.clear();
  }

  // multiply(place) for all tiles of the rows, with the rows that their windows reach in the rings.
  template <class F>
  void image_rows(int64_t image, int64_t head, int64_t begin, int64_t end, bool loads_left, const F& multiply) {
    for (int64_t y = begin - radius; y < end + radius; ++y) {
      for (int64_t x = 0; y >= 0 && y < p.rows.height && x < p.width; x += lanes<A>) {
        tiles.load(p.right, {image, head, y, x}, p.d, right_rows.at(y, x), right_rows.stride());
        if (loads_left) tiles.load(p.left, {image, head, y, x}, cells, left_rows.at(y, x), left_rows.stride());
      }
      for (int64_t x = 0; y >= begin + radius && x < p.width; x += lanes<A>) multiply(Place{image, head, y - radius, x});
    }
  }

  void dot_tile(Place at) {
    tiles.load(p.left, at, p.d, tile, lanes<A>);
    right_rows.point_at_window(at.y, at.x, p.rows.height, right_cells);
    in_even_blocks<9>(cells, [&](auto size, int64_t first) {
      constexpr int N = decltype(size)::value;
      Vector<A> sums[N] = {};
      dot<N>(tile, lanes<A>, p.d, WindowRows<A>{right_cells, right_rows.stride()}, first, sums);
      for (int n = 0; n < N; ++n) store(weights + (first + n) * lanes<A>, sums[n]);
    });
    fill_outside(at, p.outside);
    tiles.store(weights, cells, p.out, at);
  }

  void weigh_tile(Place at) {
    tiles.load(p.left, at, cells, weights, lanes<A>);
    fill_outside(at, 0);
    for (int64_t n = 0; n < cells; ++n) weight_cells[n] = weights + n * lanes<A>;
    add_products(at);
  }

  // Cell n of the window that holds a key is, seen from the key, at the opposite offset.
  void collect_tile(Place at) {
    left_rows.point_at_window(at.y, at.x, p.rows.height, weight_cells);
    for (int64_t n = 0; n < cells; ++n) weight_cells[n] += (cells - 1 - n) * left_rows.stride();
    add_products(at);
  }

 private:
  void add_products(Place at) {
    right_rows.point_at_window(at.y, at.x, p.rows.height, right_cells);
    __builtin_memset(tile, 0, p.d * lanes<A> * sizeof(A));
    accumulate(weight_cells, cells, WindowRows<A>{right_cells, right_rows.stride()}, p.d, tile);
    tiles.store(tile, p.d, p.out, at);
  }

  void fill_outside(Place at, A value) {
    for (int64_t n = 0; n < cells; ++n) {
      const int64_t y = at.y + n / p.window_size - radius, x = at.x + n % p.window_size - radius;
      const bool row_inside = y >= 0 && y < p.rows.height;
      if (row_inside && x >= 0 && x + lanes<A> <= p.width) continue;
      for (int64_t lane = 0; lane < lanes<A>; ++lane)
        if (!row_inside || x + lane < 0 || x + lane >= p.width) weights[n * lanes<A> + lane] = value;
    }
  }

  const WindowProblem<A>& p;
  int64_t cells, radius;
  MapTiles<A> tiles;
  RowRing<A> left_rows, right_rows;
  A *weights, *tile;
  const A **weight_cells, **right_cells;
};

template <class A>
void multiply(const WindowProblem<A>& problem, bool loads_left, void (Products<A>::*tile)(Place)) {
  parallel_for(problem.rows.heads * problem.rows.parts, 1, [&](int64_t first, int64_t last) {
    Arena size{nullptr};
    Products<A>(size, problem);
    const Scratch<char> memory(size.used);
    Arena arena{memory};
    Products<A> products(arena, problem);
    products.prepare();
    int64_t current = 0;
    for_tasks(
        problem.rows, first, last, [&](int64_t head, int64_t) { current = head; },
        [&](int64_t image, int64_t begin, int64_t end) {
          products.image_rows(image, current, begin, end, loads_left, [&](Place at) { (products.*tile)(at); });
        },
        [] {});
  });
}

}  // namespace

void window_dot(const WindowProblem<float>& problem) { multiply(problem, false, &Products<float>::dot_tile); }
void window_dot(const WindowProblem<double>& problem) { multiply(problem, false, &Products<double>::dot_tile); }
void window_weigh(const WindowProblem<float>& problem) { multiply(problem, false, &Products<float>::weigh_tile); }
void window_weigh(const WindowProblem<double>& problem) { multiply(problem, false, &Products<double>::weigh_tile); }
void window_collect(const WindowProblem<float>& problem) { multiply(problem, true, &Products<float>::collect_tile); }
void window_collect(const WindowProblem<double>& problem) { multiply(problem, true, &Products<double>::collect_tile); }

}  // namespace foveal::FOVEAL_ISA
