"""What a backend wants instead of a canonical graph: passes over onnx-ir models, each with its rule in its docstring.

A pass says what it requires and what it ensures, and checks both. Nothing that the runtime imports imports this
package: onnx-ir belongs to the export extra.
"""
