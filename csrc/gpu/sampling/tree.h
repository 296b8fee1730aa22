// Verification of trees of drafts. Every block of a team walks the tree by itself.
#pragma once

#include "gpu/sampling/chain.h"

namespace fusedcomm::gpu::sampling {

// The nodes of a tree in shared memory, where there is room for them: all that the walk needs is read side by side
// before it, but for probabilities of nodes that are not where their links say.
struct Node {
  int32_t token;     // -1: none
  int32_t position;  // in predicts; -1: none
  int32_t child, sibling;
  int32_t parent;  // of those whose children lead here, one; -1: none
  float coin;      // for its children
  float p;         // that the target gives it after its parent
};

__host__ __device__ inline int64_t bytes_of_nodes(int size) { return int64_t(size) * int64_t(sizeof(Node)); }

struct Path {
  int last, accepted;
};

template <class Team>
struct alignas(16) TreeMemory {
  ResidualMemory<Team> residual;
  Path path;

  __device__ void open(const Team& team) { residual.open(team); }
};

class Tree {
 public:
  // nodes: room for all of them, if there is.
  __device__ Tree(const TreeArguments& a, int64_t tree, Node* nodes, bool has_room)
      : a_(a),
        first_(tree * a.size),
        target_(a.target_probs + first_ * a.vocab),
        draft_(a.draft_probs + first_ * a.vocab),
        nodes_(nodes),
        has_room_(has_room) {}

  __device__ const float* target(int node) const { return target_ + int64_t(node) * a_.vocab; }
  __device__ float* draft(int node) const { return draft_ + int64_t(node) * a_.vocab; }

  // By a block.
  __device__ void load() {
    if (!has_room_) return;
    for (int i = int(threadIdx.x); i < a_.size; i += int(blockDim.x)) nodes_[i] = read(i);
    __syncthreads();
    // of a node that several lead to, any is its parent: the walk compares
    for (int i = int(threadIdx.x); i < a_.size; i += int(blockDim.x)) {
      int node = nodes_[i].child;
      for (int step = 1; step < a_.size && node >= 0; ++step) {
        atomicMax(&nodes_[node].parent, i);
        node = nodes_[node].sibling;
      }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < a_.size; i += int(blockDim.x)) {
      Node& node = nodes_[i];
      if (node.parent >= 0) node.p = probability_of(target(node.parent), node.token, a_.vocab);
    }
    __syncthreads();
  }

  __device__ Node node(int i, int parent) const {
    if (!has_room_) {
      Node node = read(i);
      node.p = probability_of(target(parent), node.token, a_.vocab);
      return node;
    }
    Node node = nodes_[i];
    if (node.parent != parent) node.p = probability_of(target(parent), node.token, a_.vocab);
    return node;
  }

  __device__ Node root() const { return read(0); }

 private:
  __device__ Node read(int i) const {
    const int64_t token = a_.candidates[first_ + i], position = a_.retrive_index[first_ + i];
    const int64_t child = a_.retrive_next_token[first_ + i], sibling = a_.retrive_next_sibling[first_ + i];
    Node node;
    node.token = is_inside(token, a_.vocab) ? int32_t(token) : -1;
    node.position = is_inside(position, a_.num_positions) ? int32_t(position) : -1;
    node.child = is_inside(child, a_.size) ? int32_t(child) : -1;
    node.sibling = is_inside(sibling, a_.size) ? int32_t(sibling) : -1;
    node.parent = -1;
    node.coin = a_.uniforms[first_ + i];
    node.p = 0.0f;
    return node;
  }

  const TreeArguments& a_;
  int64_t first_;
  const float* target_;
  float* draft_;
  Node* nodes_;
  bool has_room_;
};

// By one thread of each block. The blocks of a team write what is theirs: the first one the path, each the draft
// probabilities of its part of the row, which it reads afterwards. It visits no more than the D - 1 nodes that a tree
// has below its root, so it ends whatever the links are.
template <class Team>
__device__ inline Path walk(const Team& team, const TreeArguments& a, const Tree& tree, int64_t row, int first_token,
                            int end_token) {
  const bool writes = team.rank() == 0;
  int32_t* const accept_index = a.accept_index + row * a.path_size;
  Node at_node = tree.root();
  Path path = {0, 0};
  if (writes) accept_index[0] = at_node.position;
  int next = at_node.child;
  float acc = 0.0f;
  for (int visited = 1; visited < a.size && next >= 0 && path.accepted < a.path_size - 1; ++visited) {
    const Node node = tree.node(next, path.last);
    acc += node.p;
    if (node.p > 0.0f && (at_node.coin < divide(acc, a.threshold_acc) || node.p >= a.threshold_single)) {
      ++path.accepted;
      if (writes) {
        if (at_node.position >= 0) a.predicts[at_node.position] = node.token;
        accept_index[path.accepted] = node.position;
      }
      path.last = next;
      at_node = node;
      acc = 0.0f;
      next = node.child;
    } else {
      if (node.token >= first_token && node.token < end_token) tree.draft(path.last)[node.token] = node.p;
      next = node.sibling;
    }
  }
  return path;
}

// Writes to predicts, which is -1 everywhere before.
struct VerifyTree {
  static constexpr int kBlocksOfSm = 2;
  struct Arguments {
    TreeArguments tree;
    bool has_room;  // for the nodes, where the slice goes after the walk
  };
  template <class Team>
  using Memory = TreeMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& given) {
    const TreeArguments& a = given.tree;
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Tree tree(a, row, reinterpret_cast<Node*>(room_for_slice(memory)), given.has_room);
    tree.load();
    if (threadIdx.x == 0) {
      const int elements = elements_of_block(a.vocab, team.size());
      memory.path = walk(team, a, tree, row, elements * team.rank(), elements * (team.rank() + 1));
    }
    __syncthreads();
    const Path path = memory.path;
    if (team.rank() == 0) {
      for (int i = int(threadIdx.x); i < a.path_size; i += int(blockDim.x)) {
        if (i > path.accepted) a.accept_index[row * a.path_size + i] = -1;
      }
      if (threadIdx.x == 0) a.accept_token_num[row] = path.accepted;
    }
    const int64_t position = a.retrive_index[row * a.size + path.last];
    const float* const draft = path.accepted == a.path_size - 1 ? nullptr : tree.draft(path.last);
    Slice slice(team, Difference(tree.target(path.last), draft), a.vocab, room_for_slice(memory));
    draw_residual(team, memory.residual, slice, a.final_uniforms[row], [&](int token) {
      if (is_inside(position, a.num_positions)) a.predicts[position] = token;
    });
  }
};

}  // namespace fusedcomm::gpu::sampling
