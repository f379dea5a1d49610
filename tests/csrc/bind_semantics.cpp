// SPDX-License-Identifier: Apache-2.0
// The rules in csrc/semantics, and those of kernels that need no GPU, for the property tests in this folder, one by one.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "kernels/backward_rows/row_numbers.h"
#include "kernels/decode_sm90/ranges.h"
#include "kernels/prefill_sm90/tile_rows.h"
#include "semantics/score.h"
#include "semantics/sequence.h"
#include "semantics/softmax.h"

namespace py = pybind11;

namespace {

py::tuple pair(fa::KeyRange range) { return py::make_tuple(range.begin, range.end); }
py::tuple pair(fa::SoftmaxState state) { return py::make_tuple(state.max, state.sum); }

py::dict sequence_at(int64_t b, int64_t seqlen_q, int64_t seqlen_kv, const py::dict& indices, int64_t query_offset,
                     bool bottom_right) {
  fa::SequenceRule rule{};
  rule.seqlen_q = seqlen_q, rule.seqlen_kv = seqlen_kv, rule.query_offset = query_offset, rule.align_bottom_right = bottom_right;
  rule.window_left = rule.window_right = -1;
  const auto index = [&](const char* name) -> fa::IndexView {
    if (!indices.contains(name)) return {nullptr, 0, false};
    const py::array array = indices[name];
    return {array.data(), array.strides(0) / array.itemsize(), array.itemsize() == 8};
  };
  rule.kv_lengths = index("kv_lengths"), rule.query_lengths = index("query_lengths"), rule.query_offsets = index("query_offsets");
  rule.num_sequences = indices.contains("cu_seqlens_q") ? py::len(indices["cu_seqlens_q"]) - 1 : b + 1;
  rule.cu_seqlens_q = index("cu_seqlens_q"), rule.cu_seqlens_kv = index("cu_seqlens_kv");
  const fa::Sequence s = rule.at(b);
  py::dict d;
  d["batch_idx"] = s.batch_idx, d["first_row"] = s.first_row, d["num_rows"] = s.num_rows, d["query_length"] = s.query_length;
  d["first_key"] = s.first_key, d["num_keys"] = s.num_keys, d["kv_length"] = s.mask.kv_length, d["offset"] = s.mask.query_offset;
  return d;
}

/// (sequence, its tile) for all tiles of a head, (-1, -1) for those of no sequence.
std::vector<std::pair<int64_t, int64_t>> key_tile_places(const std::vector<int32_t>& starts, int64_t seqlen_kv, int tile_rows) {
  fa::SequenceRule rule{};
  rule.num_sequences = static_cast<int64_t>(starts.size()) - 1;
  rule.cu_seqlens_q = rule.cu_seqlens_kv = {starts.data(), 1, false};
  rule.seqlen_q = rule.seqlen_kv = seqlen_kv;
  fa::AttentionParams params{};
  params.cu_seqlens_q.present = true;
  params.cu_seqlens_q.shape[0] = static_cast<int64_t>(starts.size());
  params.key.shape[2] = seqlen_kv;
  const fa::RowTiles tiles = fa::row_tiles(params, params.key, tile_rows);
  std::vector<std::pair<int64_t, int64_t>> places;
  for (uint32_t tile = 0; tile < tiles.of_head; ++tile) {
    const fa::KeyTilePlace place = fa::key_tile_place(tiles, rule, tile);
    places.emplace_back(place.tile < 0 ? -1 : int64_t{place.sequence_idx}, place.tile);
  }
  return places;
}

using Pieces = std::vector<std::tuple<int, int, int, int, int, int>>;

/// Heads of so many key tiles, on at most so many blocks of decode_sm90: (head, from, to, block, first block, count of parts) of
/// all pieces.
Pieces pieces_of_heads(const std::vector<int>& tiles, int blocks) {
  namespace decode = fa::decode_sm90;
  int units = 0;
  for (const int count : tiles) units += count;
  const decode::Schedule schedule = decode::cut(units, blocks);
  Pieces pieces;
  for (int block = 0; block < schedule.blocks; ++block) {
    const int begin = decode::cut_of(schedule, block), end = decode::cut_of(schedule, block + 1);
    decode::UnitRange head{0, 0};
    for (size_t i = 0; i < tiles.size(); ++i) {
      head = {head.to, head.to + tiles[i]};
      if (head.to <= begin || head.from >= end) continue;
      const decode::UnitRange part = decode::part_of_head(head, begin, end, schedule.snap);
      const decode::HeadParts parts = decode::parts_of_head(schedule, head);
      if (part.from < part.to)
        pieces.emplace_back(i, part.from - head.from, part.to - head.from, block, parts.first_block, parts.count);
    }
  }
  return pieces;
}

/// Of a tile of prefill_sm90 what place_rows is about.
struct TileRows {
  int first_row, next_row = 64, next_pair = 128;
};

/// For each tile of a sequence of `num_rows` rows the first row of each of kWarpgroups warpgroups, as those know it that are
/// compiled for so many, and as the others do.
template <int kWarpgroups>
std::vector<std::vector<std::pair<int, int>>> rows_of_tiles(int num_rows, bool end_with_rows, bool folds) {
  namespace prefill = fa::prefill_sm90;
  constexpr int kTileRows = 64 * kWarpgroups;
  const int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  std::vector<std::vector<std::pair<int, int>>> tiles(num_tiles);
  for (int i = 0; i < num_tiles; ++i) {
    TileRows tile{i * kTileRows};
    prefill::place_rows<kTileRows>(i, num_tiles, num_rows, end_with_rows, folds, tile);
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
      tiles[i].emplace_back(prefill::first_row_of<kWarpgroups>(tile, warpgroup), prefill::first_row_of(tile, warpgroup));
    }
  }
  return tiles;
}

}  // namespace

void bind_semantics(py::module_& m) {
  py::class_<fa::MaskRule>(m, "MaskRule")
      .def(py::init([](int64_t kv_length, int64_t query_offset, int64_t window_left, int64_t window_right) {
        return fa::MaskRule{kv_length, query_offset, window_left, window_right};
      }))
      .def("visible", &fa::MaskRule::visible)
      .def("band", &fa::MaskRule::band)
      .def("key_range", [](const fa::MaskRule& rule, int64_t first, int64_t last) { return pair(rule.key_range(first, last)); })
      .def("full_range",
           [](const fa::MaskRule& rule, int64_t first, int64_t last) { return pair(rule.full_range(first, last)); });
  py::class_<fa::RowBand>(m, "RowBand").def("first", &fa::RowBand::first).def("end", &fa::RowBand::end);
  m.def("merge",
        [](float max_a, float sum_a, float max_b, float sum_b) { return pair(fa::merge({max_a, sum_a}, {max_b, sum_b})); });
  m.def("add_sink", [](float max, float sum, float sink) { return pair(fa::add_sink({max, sum}, sink)); });
  m.def("lse", [](float max, float sum) { return fa::lse({max, sum}); });
  m.def("normalizer", [](float max, float sum) { return fa::normalizer({max, sum}); });
  m.def("rescale_factor", [](float from, float to) { return fa::rescale_factor(from, to); });
  m.def("alibi_bias", [](float slope, int64_t position, int64_t key) { return fa::alibi_bias(slope, position, key); });
  m.def("capped", [](float dot, float scale, float softcap) { return fa::ScoreRule{scale, softcap}.capped(dot); });
  m.def("sequence_at", sequence_at);
  m.def("key_tile_places", key_tile_places);
  m.def("pieces_of_heads", pieces_of_heads);
  m.def("rows_of_tiles", [](int num_rows, int warpgroups, bool end_with_rows, bool folds) {
    const auto rows = warpgroups == 1   ? rows_of_tiles<1>
                      : warpgroups == 2 ? rows_of_tiles<2>
                      : warpgroups == 3 ? rows_of_tiles<3>
                                        : rows_of_tiles<4>;
    return rows(num_rows, end_with_rows, folds);
  });
}
