package dev.lobit.host

import dev.lobit.core.LobitException
import dev.lobit.core.ModuleEngine
import dev.lobit.core.Service
import dev.lobit.core.Service.Companion.frame
import java.io.DataOutputStream
import java.io.FileOutputStream
import org.json.JSONArray
import org.json.JSONObject
import org.pytorch.executorch.ExecuTorchRuntime
import kotlin.system.exitProcess

/**
 * Runs a program for another process: `Server LIBRARIES PROGRAM METHOD CONTEXT CHUNK THREADS ANSWERS`.
 *
 * It is a [Service] whose requests come on stdin, and whose answers go to the file ANSWERS, since native code prints to stdout.
 */
fun main(arguments: Array<String>) {
    val (libraries, program, method) = arguments
    val (context, chunk, threads) = arguments.slice(3..5).map(String::toInt)
    val answers = FileOutputStream(arguments[6])
    try {
        Libraries.load(libraries)
        val engine = ModuleEngine(program, method, context, chunk, threads)
        val about = JSONObject().put("backends", JSONArray(ExecuTorchRuntime.getRegisteredBackends()))
        val service = Service(lazyOf(engine), about) { _, _ -> throw LobitException("this machine is no phone: its speed says nothing") }
        service.run(System.`in`, answers)
    } catch (error: Throwable) {
        DataOutputStream(answers).frame(Service.FAILED, (error.message ?: "$error").toByteArray())
    }
    exitProcess(0) // fbjni has a thread that would keep the process alive
}
