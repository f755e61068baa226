// The runtime's model as a graph: nodes in the order of the plan, and who makes and reads each tensor.
#pragma once
#include <string>
#include <vector>

#include "abi.h"

namespace paring {
namespace litert {

// Positions are places in the plan; tensors and nodes are known by the runtime's numbers.
class Graph {
 public:
  // False where the runtime refuses to tell.
  bool read(TfLiteContext*);
  // Looks the same nodes up again: the runtime moves them when it adds one.
  bool refresh();

  struct Node { int index; TfLiteNode* node; TfLiteRegistration* registration; };

  TfLiteContext* context = nullptr;
  std::vector<Node> nodes;
  std::vector<int> producer;               // tensor -> position, or -1
  std::vector<std::vector<int>> readers;   // tensor -> positions

  int size() const { return int(nodes.size()); }
  int code(int position) const { return nodes[size_t(position)].registration->builtin_code; }
  int position(int node_index) const;      // -1 where the plan does not have it
  const TfLiteTensor& tensor(int index) const { return context->tensors[index]; }
  int input(int position, int which) const;    // a tensor, or -1
  int output(int position, int which) const;
  int inputs(int position) const { return nodes[size_t(position)].node->inputs->size; }
  // The name of what a node makes, printable and of bounded length.
  std::string name(int position) const;

  // The runs that the runtime will make of the plan when it hands the marked nodes over: it takes, turn by turn, all nodes
  // of one kind (marked or not) that are ready. Gives the number of the turn of each position.
  std::vector<int> turns(const std::vector<bool>& marked) const;

 private:
  std::vector<int> position_;              // node -> position
};

std::vector<int> dims_of(const TfLiteTensor&);
int64_t elements_of(const std::vector<int>& dims);

}  // namespace litert
}  // namespace paring
