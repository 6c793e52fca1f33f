package dev.lobit.demo

import dev.lobit.demo.service.Client
import dev.lobit.demo.service.Listener
import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.IOException
import java.io.InputStream
import java.io.OutputStream
import java.io.PipedInputStream
import java.io.PipedOutputStream
import java.util.concurrent.LinkedBlockingQueue

/** A listener whose clients are made by [connect]. */
class FakeListener(val name: String) : Listener {
    private val waiting = LinkedBlockingQueue<FakeClient>()

    @Volatile var isClosed = false
        private set

    fun connect(uid: Int) = FakeClient(uid).also(waiting::put)

    override fun accept(): Client = waiting.take().also { if (isClosed) throw IOException("the socket is closed") }

    override fun close() {
        isClosed = true
        waiting.put(FakeClient(-1))
    }
}

/** A client with the sides of its streams that a computer has: [requests] and [answers]. */
class FakeClient(override val uid: Int) : Client {
    private val sent = PipedOutputStream()
    private val received = PipedInputStream(SIZE)
    private val service = PipedInputStream(sent, SIZE)
    val requests = DataOutputStream(sent)
    val answers = DataInputStream(received)
    override val output: OutputStream = PipedOutputStream(received)

    @Volatile var wasRead = false
        private set

    @Volatile var isClosed = false
        private set
    override val input: InputStream
        get() {
            wasRead = true
            return service
        }

    override fun close() {
        isClosed = true
        sent.close() // a read that waits ends with the writer's side alone
        service.close()
        output.close()
    }

    private companion object {
        const val SIZE = 1 shl 20
    }
}
