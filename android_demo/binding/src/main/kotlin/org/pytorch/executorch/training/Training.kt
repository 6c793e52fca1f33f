// The native library registers functions on these classes when it is loaded, so they must be there; nothing uses them.
package org.pytorch.executorch.training

import com.facebook.jni.HybridData
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Tensor

class TrainingModule private constructor(private val mHybridData: HybridData) {
    private external fun executeForwardBackwardNative(method: String, arguments: Array<EValue>): Array<EValue>

    private external fun namedParametersNative(method: String): Map<String, Tensor>

    private external fun namedGradientsNative(method: String): Map<String, Tensor>

    companion object {
        @JvmStatic private external fun initHybrid(program: String, data: String): HybridData
    }
}

class SGD private constructor(private val mHybridData: HybridData) {
    private external fun stepNative(gradients: Map<String, @JvmSuppressWildcards Tensor>)

    companion object {
        @JvmStatic
        private external fun initHybrid(
            parameters: Map<String, @JvmSuppressWildcards Tensor>,
            rate: Double, momentum: Double, dampening: Double, decay: Double, nesterov: Boolean,
        ): HybridData
    }
}
