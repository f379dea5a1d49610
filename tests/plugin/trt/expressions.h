// SPDX-License-Identifier: Apache-2.0
// TensorRT's symbolic dimensions, stood in for: expressions that can be evaluated for any binding. Used by host_build.cpp.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

namespace host {

/// A constant, a symbol (one axis of one input) or an operation on two others.
class Expression final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  enum class Kind { kConstant, kSymbol, kOperation };

  Expression(Kind kind, int64_t value) : kind_(kind), value_(value) { mImpl = this; }
  Expression(nvinfer1::DimensionOperation op, const Expression& first, const Expression& second)
      : kind_(Kind::kOperation), op_(op), first_(&first), second_(&second) {
    mImpl = this;
  }

  /// The value where symbol i is symbols[i]; nothing where it divides by zero or uses an operation that TensorRT lacks.
  std::optional<int64_t> evaluate(const std::vector<int64_t>& symbols) const {
    if (kind_ == Kind::kConstant) return value_;
    if (kind_ == Kind::kSymbol) return symbols.at(static_cast<size_t>(value_));
    const std::optional<int64_t> a = first_->evaluate(symbols), b = second_->evaluate(symbols);
    if (!a || !b) return std::nullopt;
    switch (op_) {
      case nvinfer1::DimensionOperation::kSUM:
        return *a + *b;
      case nvinfer1::DimensionOperation::kPROD:
        return *a * *b;
      case nvinfer1::DimensionOperation::kMAX:
        return *a > *b ? *a : *b;
      case nvinfer1::DimensionOperation::kMIN:
        return *a < *b ? *a : *b;
      case nvinfer1::DimensionOperation::kSUB:
        return *a - *b;
      case nvinfer1::DimensionOperation::kEQUAL:
        return *a == *b;
      case nvinfer1::DimensionOperation::kLESS:
        return *a < *b;
      case nvinfer1::DimensionOperation::kFLOOR_DIV:
        return *b == 0 ? std::nullopt : std::optional<int64_t>(*a / *b);
      case nvinfer1::DimensionOperation::kCEIL_DIV:
        return *b == 0 ? std::nullopt : std::optional<int64_t>((*a + *b - 1) / *b);
    }
    return std::nullopt;
  }

 private:
  bool isConstant() const override { return kind_ == Kind::kConstant; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

  Kind kind_;
  int64_t value_ = 0;
  nvinfer1::DimensionOperation op_{};
  const Expression* first_ = nullptr;
  const Expression* second_ = nullptr;
};

class ExpressionBuilder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  ExpressionBuilder() { mImpl = this; }
  const Expression* symbol(size_t index) { return keep(Expression::Kind::kSymbol, static_cast<int64_t>(index)); }
  const Expression* number(int64_t value) { return keep(Expression::Kind::kConstant, value); }

 private:
  const Expression* keep(Expression::Kind kind, int64_t value) { return &expressions_.emplace_back(kind, value); }
  const nvinfer1::IDimensionExpr* constant(int64_t value) override { return number(value); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op, const nvinfer1::IDimensionExpr& first,
                                            const nvinfer1::IDimensionExpr& second) override {
    return &expressions_.emplace_back(op, static_cast<const Expression&>(first), static_cast<const Expression&>(second));
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

  std::deque<Expression> expressions_;  // addresses stay
};

}  // namespace host
